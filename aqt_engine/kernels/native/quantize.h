// Rows of floats to int8, each by its largest magnitude: what XLA makes of six operations.
#ifndef AQT_KERNELS_QUANTIZE_H_
#define AQT_KERNELS_QUANTIZE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace aqt {

struct Rows {
  const float* values;  // rows x depth
  int8_t* quantized;    // rows x depth
  float* scales;        // rows
  int64_t rows;
  int64_t depth;
  float factor;  // of the largest magnitude, to give the scale
  float bound;   // of what is not clipped, 127 at most

  Rows From(int64_t row, int64_t count) const {
    return {values + row * depth, quantized + row * depth, scales + row, count, depth, factor,
            bound};
  }
};

// A value is multiplied by the inverse of the scale, clipped, and rounded half to even. Nothing is
// added, so there are no sums to be rounded otherwise; and denormals are what the thread makes of
// them, for XLA's operations too. It is compiled for the instructions of the function that has it.
__attribute__((always_inline)) inline void QuantizeRows(const Rows& given) {
  constexpr int32_t kInfinity = 0x7f800000;
  const float bound = given.bound;
  const int64_t depth = given.depth;
  for (int64_t r = 0; r < given.rows; ++r) {
    const float* values = given.values + r * depth;
    int8_t* quantized = given.quantized + r * depth;
    // Magnitudes are ordered as their bits are. NaNs are above infinity, and count as it.
    int32_t largest = 0;
    for (int64_t k = 0; k < depth; ++k) {
      int32_t bits;
      std::memcpy(&bits, values + k, sizeof(bits));
      largest = std::max(largest, bits & 0x7fffffff);
    }
    largest = std::min(largest, kInfinity);
    float magnitude;
    std::memcpy(&magnitude, &largest, sizeof(magnitude));
    const float scale = (magnitude == 0 ? 1 : magnitude) * given.factor;
    given.scales[r] = scale;
    if (std::isinf(scale)) {
      // Times 0, finite values are 0 and others NaN, and NaN becomes 0.
      std::memset(quantized, 0, depth);
      continue;
    }
    const float quotient = 1 / scale;
    const float inverse = std::isinf(quotient) ? 1 : quotient;
    for (int64_t k = 0; k < depth; ++k) {
      float value = values[k] * inverse;
      value = value < -bound ? -bound : value;
      value = value > bound ? bound : value;
      quantized[k] = static_cast<int8_t>(static_cast<int32_t>(std::rint(value)));
    }
  }
}

}  // namespace aqt

#endif  // AQT_KERNELS_QUANTIZE_H_
