// AVX2: values are widened to int16, and two products at once are added to an int32.
//
// The instruction that multiplies bytes saturates its int16 sums, and so is of no use here.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "instruction_set.h"

#define AQT_TARGET __attribute__((target("avx2")))

namespace aqt {
namespace {

// Rows of a tile of 16 columns, in 4 vectors of 4 columns with 2 sums each.
constexpr int64_t kRows = 2;
constexpr int64_t kColumns = 16;
constexpr int kVectors = 4;

bool Supported() { return __builtin_cpu_supports("avx2"); }

int64_t RowBytes(int64_t depth) { return 2 * RoundUp(depth, kGroup); }

AQT_TARGET void Prepare(const int8_t* lhs, int64_t rows, int64_t depth, void* prepared) {
  auto* out = static_cast<int16_t*>(prepared);
  for (int64_t r = 0; r < rows; ++r, lhs += depth, out += RoundUp(depth, kGroup)) {
    for (int64_t k = 0; k < depth; ++k) out[k] = lhs[k];
    for (int64_t k = depth; k < RoundUp(depth, kGroup); ++k) out[k] = 0;
  }
}

template <int R>
AQT_TARGET void Tile(const int16_t* lhs, int64_t row_values, const int8_t* rhs, int64_t width,
                     int64_t columns, int32_t* out, int64_t stride) {
  __m256i sums[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm256_setzero_si256();
  }
  for (int64_t k = 0; k < row_values; k += kGroup, rhs += width * kGroup) {
    __m256i four[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      int64_t values;
      std::memcpy(&values, lhs + r * row_values + k, sizeof(values));
      four[r] = _mm256_set1_epi64x(values);
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const auto* at = reinterpret_cast<const __m128i*>(rhs + v * kColumns);
      const __m256i values = _mm256_cvtepi8_epi16(_mm_loadu_si128(at));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(four[r], values));
        // Keeps a sum in one register, where the compiler would copy it around.
        __asm__("" : "+x"(sums[r][v]));
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    alignas(32) int32_t row[kColumns];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; v += 2) {
      const __m256i halves = _mm256_hadd_epi32(sums[r][v], sums[r][v + 1]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(row + v * kVectors),
                         _mm256_permute4x64_epi64(halves, 0b11011000));
    }
    std::memcpy(out + r * stride, row, columns * sizeof(int32_t));
  }
}

using TileFunction = void (*)(const int16_t*, int64_t, const int8_t*, int64_t, int64_t, int32_t*,
                              int64_t);
constexpr std::array<TileFunction, kRows> kTiles = {Tile<1>, Tile<2>};

void Multiply(const void* prepared, int64_t rows, int64_t depth, const Panel& panel, int32_t* out,
              int64_t stride) {
  const int64_t row_values = RoundUp(depth, kGroup);
  for (int64_t column = 0; column < panel.columns; column += kColumns) {
    const auto* lhs = static_cast<const int16_t*>(prepared);
    const int64_t columns = std::min(kColumns, panel.columns - column);
    for (int64_t row = 0; row < rows; row += kRows) {
      kTiles[std::min(kRows, rows - row) - 1](lhs + row * row_values, row_values,
                                              panel.values + column * kGroup, panel.width, columns,
                                              out + row * stride + column, stride);
    }
  }
}

AQT_TARGET void Quantize(const Rows& rows) { QuantizeRows(rows); }

}  // namespace

const InstructionSet kAvx2 = {"avx2", Supported, RowBytes, 1, Prepare, Multiply,
                              Quantize};

}  // namespace aqt
