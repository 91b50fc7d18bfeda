// The functions that Python calls (lowrank_optim/kernels/cuda/library.py declares the same): plain pointers, sizes and numbers.
//
// Each returns 0 or a cudaError_t. Arguments are not checked, nothing waits for the device. Structures are passed by pointer and read
// before the function returns. Whoever changes a signature or a structure raises ABI_VERSION here and in library.py.
#include "launch.h"

using namespace lowrank;

#define LOWRANK_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int ABI_VERSION = 4;

template <class Op, class Run, class Units>
int run_many(const Op* ops, int64_t count, const Units& units_of, const Run& run) {
  for (int64_t begin = 0; begin < count; begin += Many<Op>::MOST) {
    Many<Op> chunk;
    chunk.count = static_cast<int32_t>(count - begin < Many<Op>::MOST ? count - begin : Many<Op>::MOST);
    int64_t units = 0;
    for (int k = 0; k < chunk.count; ++k) {
      chunk.ops[k] = ops[begin + k];
      chunk.first[k] = units;
      units += units_of(begin + k);
    }
    if (const int error = run(chunk, units)) return error;
  }
  return 0;
}

int64_t segments(const Coding& coding) { return coding.rows * coding.blocks(); }

}  // namespace

LOWRANK_API int lowrank_optim_cuda_abi_version() { return ABI_VERSION; }

LOWRANK_API const char* lowrank_optim_cuda_build_info() {
#define LOWRANK_TEXT_(x) #x
#define LOWRANK_TEXT(x) LOWRANK_TEXT_(x)
#ifdef __CUDACC__
  return "nvcc " LOWRANK_TEXT(__CUDACC_VER_MAJOR__) "." LOWRANK_TEXT(__CUDACC_VER_MINOR__);
#else
  return "host";
#endif
}

LOWRANK_API const char* lowrank_optim_cuda_error(int code) { return error_text(code); }

// adam_direct_, adam_dense_: `count` tensors of sizes[k] elements in as few launches as their descriptions fit in.
LOWRANK_API int lowrank_optim_cuda_adam(const AdamElement* ops, const int64_t* sizes, int64_t count, void* stream) {
  if (count == 1) return run_elements(ops[0], sizes[0], stream);
  return run_many(ops, count, [&](int64_t k) { return sizes[k]; },
                  [&](const Many<AdamElement>& chunk, int64_t units) { return run_elements(chunk, units, stream); });
}

// lion_direct_, sgd_direct_, rmsprop_direct_.
LOWRANK_API int lowrank_optim_cuda_rule(const RuleElement* op, int64_t size, void* stream) {
  return run_elements(*op, size, stream);
}

LOWRANK_API int lowrank_optim_cuda_gaussian(const GaussianElement* op, void* stream) {
  return run_elements(*op, op->pairs(), stream);
}

// stochastic_round_, apply_dense_.
LOWRANK_API int lowrank_optim_cuda_store(const StoreElement* op, int64_t size, void* stream) {
  return run_elements(*op, size, stream);
}

// coded_adam_direct_, coded_adam_dense_, of `count` matrices.
LOWRANK_API int lowrank_optim_cuda_coded_adam(const CodedAdamBlock* ops, int64_t count, void* stream) {
  if (count == 1) return run_segments(ops[0], segments(ops[0].coding), stream);
  return run_many(ops, count, [&](int64_t k) { return segments(ops[k].coding); },
                  [&](const Many<CodedAdamBlock>& chunk, int64_t units) { return run_segments(chunk, units, stream); });
}

LOWRANK_API int lowrank_optim_cuda_quantize_rows(const QuantizeBlock* op, void* stream) {
  return run_segments(*op, segments(op->coding), stream);
}

LOWRANK_API int lowrank_optim_cuda_dequantize_rows(const DequantizeBlock* op, void* stream) {
  return run_segments(*op, segments(op->coding), stream);
}

LOWRANK_API int lowrank_optim_cuda_pack_basis(const PackBlock* op, void* stream) {
  return run_segments(*op, segments(op->coding), stream);
}

LOWRANK_API int lowrank_optim_cuda_unpack_basis(const UnpackBlock* op, void* stream) {
  return run_segments(*op, segments(op->coding), stream);
}
