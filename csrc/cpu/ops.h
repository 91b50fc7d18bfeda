// What the operations take (lowrank_optim/kernels/cpu/structures.py has the same structures), and the tables of the kernels that do
// them, six for each instruction set.
//
// Definitions: lowrank_optim/kernels/reference.py and coded_reference.py. Every float operation here is rounded to float32 once, in
// the order written there, without fused multiply-adds, so all instruction sets, thread counts and ways of cutting a tensor give the
// same bits.
#pragma once

#include <cstdint>

namespace lowrank {

// Tensors may start at any byte.
typedef float f32 __attribute__((aligned(1), may_alias));
typedef double f64 __attribute__((aligned(1), may_alias));
typedef uint16_t u16 __attribute__((aligned(1), may_alias));
typedef int32_t s32 __attribute__((aligned(1), may_alias));
typedef uint8_t u8;
typedef int8_t s8;

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// A matrix whose rows have unit stride; strides count elements.
struct Rows {
  void* data;
  int32_t dtype;
  int64_t stride;
};

struct ConstRows {
  const void* data;
  int32_t dtype;
  int64_t stride;
};

// Random bits as a function of key and position (kernels/counter_rng.py); `on` false rounds to nearest.
struct Noise {
  bool on;
  uint64_t key;
  int64_t start;    // position of the first element
  uint16_t offset;  // added to the bits of codes: turn times the golden ratio
};

// Of a row or a unit of one: Σ N² and Σ g².
struct Squares {
  double direction, grad;
};

// √total as if summed in float32: what is too large for it is infinite, as v would be.
static inline float root_of(double total) {
  return total > double(__FLT_MAX__) ? __builtin_huge_valf() : float(__builtin_sqrt(total));
}

// m ← lerp(m, g, weight1), v ← beta2 v + weight2 g², N = m / (√v root_factor + root_offset)
struct Adam {
  float weight1, beta2, weight2, root_factor, root_offset;
};

// What rounding weights to bfloat16 drops (kernels/rounding.py): elements lie as those of the weights do; `low` may be null, and where
// `high` is, nothing is kept.
struct WeightError {
  s8* high;
  u8* low;
};

// W ← keep W − alpha N
struct StepParams {
  float keep, alpha;
  Noise rounding;
  WeightError error;
};

// adam_direct_ (out) and adam_dense_ (weight) of `numel` elements: the other is null. With `norms`, which go with `out`, ‖N_j‖ of
// every row of `cols` elements is written there, and ‖g_j‖ to `grad_norms`.
struct AdamArgs {
  int64_t numel, cols;
  ConstRows grad;
  f32 *exp_avg, *exp_avg_sq, *out;
  Rows weight;
  Adam adam;
  StepParams write;
  f32 *norms, *grad_norms;
};

// folded_adam_dense_: `fold` neighbours of a row share a moment, of which a row has ⌈cols/fold⌉. `fold` is a power of two up to TILE.
struct FoldedAdamArgs {
  int64_t rows, cols, fold;
  ConstRows grad;
  f32 *exp_avg, *exp_avg_sq;
  Rows weight;
  Adam adam;
  float residual;
  StepParams write;
};

// lion_direct_, sgd_direct_ and rmsprop_direct_; flat tensors of float32.
enum Rule : int32_t { LION = 0, SGD = 1, NESTEROV = 2, RMSPROP = 3 };
struct RuleArgs {
  int32_t rule;
  int64_t numel;
  const f32* grad;
  f32 *moment, *out;
  float first, second, third;
};

// A matrix of `rows` × `cols` elements in blocks, whose columns may have scales: row i takes those at (i / rows_per_scale) · cols.
struct Coding {
  int64_t rows, cols, block;
  int32_t bits;
  const f32* col_scale;
  int64_t rows_per_scale;
  const f32* inverse;  // of the library: 1/col_scale, for what is to be coded
};

// coded_adam_direct_ (out) and coded_adam_dense_ (weight): the other is null. `norms` as in AdamArgs.
struct CodedAdamArgs {
  Coding coding;
  ConstRows grad;
  u8* ratio;
  f32* ratio_scale;
  u8* root;
  f32 *root_scale, *out;
  Rows weight;
  Adam adam;
  StepParams write;
  Noise noise;
  f32 *norms, *grad_norms;
  Squares* squares;  // of the library: one for each unit, where there are norms
};

struct QuantizeArgs {
  Coding coding;
  bool is_signed;
  ConstRows x;
  u8* codes;
  f32* scale;
  Noise noise;
};

struct DequantizeArgs {
  Coding coding;
  bool is_signed;
  const u8* codes;
  const f32* scale;
  Rows x;
};

struct PackArgs {
  Coding coding;
  ConstRows x;
  u8* codes;
  f32 *scale, *zero;
};

struct UnpackArgs {
  Coding coding;
  const u8* codes;
  const f32 *scale, *zero;
  Rows x;
};

// apply_ after its matrix products, and apply_dense_: W ← keep W − alpha (product + φ ⊙ E), E = grad, sign(grad) or
// sign(grad − subtract); product, grad and subtract may be null.
struct UpdateArgs {
  int64_t rows, cols;
  Rows weight;
  StepParams write;
  ConstRows product, grad, subtract;
  bool sign;
  const f32* phi;
  int64_t phi_row, phi_col;  // strides, 0 where it is broadcast
};

// target ← value, rounded; each with its error, if it has one.
struct StoreArgs {
  int64_t rows, cols;
  Rows target;
  ConstRows value;
  Noise rounding;
  WeightError error, value_error;
};

// Standard normal numbers by Box-Muller (kernels/counter_rng.py, gaussian): out[i] and out[pairs + i] from one pair of uniforms.
struct GaussianArgs {
  f32* out;
  int64_t numel;
  uint64_t key;
};

// Work is cut into units: TILE elements of a flat tensor or of a row; of coded matrices, a span of whole blocks.
constexpr int64_t TILE = 1024;

inline int64_t pieces(int64_t length, int64_t piece) { return (length + piece - 1) / piece; }

// Columns of a unit: two blocks where one ends in the middle of a byte.
inline int64_t span(const Coding& c) {
  const int64_t block = c.block < c.cols ? c.block : c.cols;
  return c.bits == 4 && block % 2 && block < c.cols ? 2 * block : block;
}

// Working memory of a thread, in floats: nine arrays of the size of a unit, apart from each other.
inline int64_t padded(const Coding& c) { return (span(c) + 47) / 16 * 16; }
inline int64_t scratch_floats(const Coding& c) { return 9 * padded(c); }

// ‖x‖ of a flat tensor, summed in parts of float32.
struct NormArgs {
  int64_t numel;
  ConstRows x;
  f32* norm;
  double* sums;  // of the library: one for each TILE of the tensor
};

// Of every row (`by_row`) or column g_j of a matrix: ‖g_j‖², and, with `dots`, g_j · b for a `vector` b, which may be empty.
struct LinesArgs {
  int64_t rows, cols;
  ConstRows grad;
  bool by_row;
  const f32* vector;
  f32 *dots, *squares;
};

// The places of a sparse matrix in compressed sparse rows: row i has entries pointers[i] … pointers[i + 1], in ascending columns, which
// are of 16 bits if `narrow`, else of 32.
struct Support {
  int64_t rows, cols;
  const s32* pointers;
  const void* columns;
  bool narrow;
};

// sltrain_forward: out (tokens × rows) += x (tokens × cols) Sᵀ. sltrain_backward_input: out (tokens × cols) += x (tokens × rows) S.
struct SparseArgs {
  Support support;
  bool forward;
  int64_t tokens;
  ConstRows values, x;
  Rows out;
};

// sampled_product: values[k] += Σ_t grad[t][i_k] x[t][j_k].
struct SampledArgs {
  Support support;
  int64_t tokens;
  ConstRows grad, x;
  f32* values;
};

// A tall matrix, size × rank; `wide`: it lies as rank × size.
struct TallArgs {
  int64_t size, rank;
  bool wide;
};

// thin_grams: out (rank × rank) = leftᵀ right.
struct GramArgs {
  TallArgs tall;
  const f32 *left, *right;
  f32* out;
};

// pair_step_: M ← (1 − share) M + share · G S, W ← keep W − alpha M; after = W_newᵀ W_new, cross = W_oldᵀ W_new.
struct PairStepArgs {
  TallArgs tall;
  f32* weight;
  const f32* grad;
  f32* momentum;
  const f32* small;
  float share, alpha, keep;
  f32 *after, *cross;
  uint64_t* marks;  // of the library: one for each unit, see PairKernels; or null
};

// thin_turn_: X ← X S.
struct TurnArgs {
  TallArgs tall;
  f32* form;
  const f32* small;
};

// inverse_power: Z diag(1/(w + shift)) Zᵀ, or with `root` Z diag(1/(√(w + shift) + added)) Zᵀ, of `count` matrices (rank × rank); 0 for
// eigenvalues up to `tolerance` times the largest.
struct InversePowerArgs {
  int64_t count, rank;
  const f64 *matrices, *shift;  // `shift`: one for each matrix, or null
  f64* out;
  double tolerance, added;
  bool root;
};

// Working memory of a thread, in floats: three matrices and three lines of vectors of at most 64 bytes.
inline int64_t eigen_floats(int64_t rank) { return 16 * rank * (3 * rank + 3); }

// rite_step_ of one factor; its neighbour, at an even or odd place, is the other one of its pair. With `moment` V (rank × rank), `share`
// and `square_share` 1 − β̃ of both moments; `added` to the roots of V, and `tolerance` as in InversePowerArgs. `known`, which may be
// null: what is known of the weights, rank · rank numbers, KNOWN_MORE after them; zeros where that is nothing.
// `finite`, which may be null: 1 is written there, or 0 where the sum of squares of the gradient is not finite in float32. A pair of which
// that is so stays as it is.
struct RiteArgs {
  TallArgs tall;
  f32* weight;
  const f32* grad;
  f32 *momentum, *moment;
  f64* known;
  float share, alpha, keep;
  double square_share, tolerance, added;
  u8* finite;
};

// After (XᵀX)^(−1/2) of the weights X that a step wrote: their mark, as an integer of 64 bits, and 1 where the step after it has found
// other weights, else 0.
constexpr int64_t KNOWN_MORE = 2;

// What a group of factors keeps between the two halves of a step, in floats: two matrices of vectors. Working memory besides: five
// matrices and three lines.
inline int64_t rite_kept_floats(int64_t rank) { return 16 * rank * 2 * rank; }
inline int64_t rite_floats(int64_t rank) { return 16 * rank * (5 * rank + 3); }

// Rows of a tile of a tall matrix, and of a unit of work.
constexpr int64_t TALL_TILE = 64, TALL_UNIT = 2048;

// Ranks in whole vectors of all instruction sets.
inline int64_t padded_rank(int64_t rank) { return (rank + 15) / 16 * 16; }

// Working memory of a thread, in floats: S and six tiles.
inline int64_t tall_floats(int64_t rank) { return padded_rank(rank) * (padded_rank(rank) + 6 * TALL_TILE); }

// Of the squares in which tokens × features are turned round.
constexpr int SIDE = 16;

// Features in whole squares.
inline int64_t whole(int64_t features) { return (features + SIDE - 1) / SIDE * SIDE; }

// Columns whose sums are taken together.
constexpr int64_t STRIP = 256;

// The kernels of each file, from unit `first` to before `last`.
struct AdamKernels {
  void (*adam)(const AdamArgs&, int64_t first, int64_t last);  // elements, or rows
  void (*rule)(const RuleArgs&, int64_t first, int64_t last);  // elements
  void (*folded_adam)(const FoldedAdamArgs&, int64_t first, int64_t last);  // units of TILE
};

struct CodeKernels {
  void (*coded_adam)(const CodedAdamArgs&, int64_t first, int64_t last, float* scratch);  // units
  void (*quantize)(const QuantizeArgs&, int64_t first, int64_t last, float* scratch);
  void (*dequantize)(const DequantizeArgs&, int64_t first, int64_t last, float* scratch);
  void (*pack)(const PackArgs&, int64_t first, int64_t last, float* scratch);
  void (*unpack)(const UnpackArgs&, int64_t first, int64_t last, float* scratch);
};

struct WeightKernels {
  void (*update)(const UpdateArgs&, int64_t first, int64_t last);  // units of TILE
  void (*store)(const StoreArgs&, int64_t first, int64_t last);
  void (*gaussian)(const GaussianArgs&, int64_t first, int64_t last);  // pairs
  void (*squares)(const NormArgs&, int64_t first, int64_t last);       // elements, from the beginning of a TILE
  void (*row_sums)(const LinesArgs&, int64_t first, int64_t last);     // rows
  void (*column_sums)(const LinesArgs&, int64_t first, int64_t last);  // strips
};

// For tiles of `tokens` tokens. `scratch` has (whole(cols) + SIDE) · tokens floats, `turned` whole(cols) · tokens for each tile.
struct SparseWidth {
  int tokens;
  void (*forward)(const SparseArgs&, int64_t tile, float* scratch);
  void (*backward_input)(const SparseArgs&, int64_t tile, float* scratch);
  void (*turn)(const SampledArgs&, int64_t tile, float* turned);
  void (*sample)(const SampledArgs&, int64_t first_row, int64_t first_tile, int64_t tiles, const float* turned);
};

struct SparseKernels {
  SparseWidth widths[3];
};

// `part`: of a unit, the sums that it adds to each result, padded × padded; of a product of a matrix with itself, the upper triangle.
struct PairKernels {
  void (*gram)(const GramArgs&, int64_t unit, float* part, float* scratch);
  void (*step)(const PairStepArgs&, int64_t unit, float* parts, float* scratch);
  void (*turn)(const TurnArgs&, int64_t unit, float* none, float* scratch);
  // A number that other weights have not, but by a chance of 2⁻⁶⁴ or so; `step` finds it for those that it writes.
  uint64_t (*mark)(const TallArgs&, const f32* weight, int64_t unit, float* scratch);
};
typedef const PairKernels& (*PairKernelsFor)(int64_t rank, bool wide);

// From matrix number unit · matrices on, `matrices` of them.
struct EigenKernels {
  int matrices;
  void (*inverse_power)(const InversePowerArgs&, int64_t unit, float* none, float* scratch);
};

// The small matrices of up to `matrices` factors, whole pairs, before and after their step. `sums`: of each factor, GᵀG after XᵀX, and
// then W_oldᵀW_new after W_newᵀW_new; XᵀX is not there where (XᵀX)^(−1/2) is `known`. `small`: what the
// gradients are multiplied by, and then the momenta.
struct RiteKernels {
  int matrices;
  void (*before)(const RiteArgs* factors, int count, bool known, const double* sums, float* kept, float* small, float* scratch);
  void (*after)(const RiteArgs* factors, int count, const double* sums, const float* kept, float* small, float* scratch);
};
typedef const RiteKernels& (*RiteKernelsFor)(int64_t rank);

#define LOWRANK_TABLES(level)                \
  namespace level {                          \
  extern const AdamKernels adam_kernels;     \
  extern const CodeKernels code_kernels;     \
  extern const WeightKernels weight_kernels; \
  extern const SparseKernels sparse_kernels; \
  extern const PairKernelsFor pair_kernels;  \
  extern const EigenKernels eigen_kernels;   \
  extern const RiteKernelsFor rite_kernels;  \
  }
LOWRANK_TABLES(baseline)
#ifdef LOWRANK_X86
LOWRANK_TABLES(avx2)
LOWRANK_TABLES(avx512)
#endif

}  // namespace lowrank
