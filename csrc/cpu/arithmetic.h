// The arithmetic of rules, of floats and of vectors of them; local to each file that includes it.
#pragma once

#include "numbers.h"

namespace lowrank {
namespace {

// As torch.lerp, which starts from the nearer end; the choice is made outside of the loops.
struct Lerp {
  float coefficient;
  bool near_end;

  explicit Lerp(float weight) : coefficient(weight < 0.5f ? weight : -(1.0f - weight)), near_end(!(weight < 0.5f)) {}

  template <class T>  // a float, or a vector of them
  INLINE T operator()(T from, T to) const {
    return (near_end ? to : from) + coefficient * (to - from);
  }
};

template <class T>
INLINE T square_update(T v, T g, float beta, float weight) {
  return v * beta + (weight * g) * g;
}

template <class T>
INLINE T adam_direction(T m, T root, const Adam& a) {
  return m / (root * a.root_factor + a.root_offset);
}

inline float sign_of(float x) { return float(int(x > 0.0f) - int(x < 0.0f)); }

}  // namespace
}  // namespace lowrank
