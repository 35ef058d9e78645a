// AVX512-VNNI: four products of an unsigned and a signed byte are added to an int32 at once.
//
// The left operand becomes unsigned by adding 128. What that adds to a sum, 128 times the sum of the
// column, is taken off by the offset that it starts with. Nothing saturates, so sums are exact
// modulo 2^32.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "instruction_set.h"

#define AQT_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

namespace aqt {
namespace {

// Rows of a tile of 2 vectors: enough that the processor multiplies without a pause, and not so many
// that the compiler runs out of registers.
constexpr int64_t kRows = 8;
constexpr int64_t kLanes = 16;

bool Supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

int64_t RowBytes(int64_t depth) { return RoundUp(depth, kGroup); }

AQT_TARGET void Prepare(const int8_t* lhs, int64_t rows, int64_t depth, void* prepared) {
  auto* out = static_cast<uint8_t*>(prepared);
  const __m512i sign = _mm512_set1_epi8(-128);
  for (int64_t r = 0; r < rows; ++r, lhs += depth, out += RowBytes(depth)) {
    int64_t k = 0;
    for (; k + 64 <= depth; k += 64) {
      _mm512_storeu_si512(out + k, _mm512_xor_si512(_mm512_loadu_si512(lhs + k), sign));
    }
    for (; k < depth; ++k) out[k] = static_cast<uint8_t>(lhs[k]) ^ 0x80;
    for (; k < RowBytes(depth); ++k) out[k] = 0;
  }
}

AQT_TARGET inline __m512i Broadcast(const uint8_t* group) {
  int32_t four;
  std::memcpy(&four, group, sizeof(four));
  return _mm512_set1_epi32(four);
}

// A tile of R rows and V vectors. Each sum is made of U parts, so that there are enough of them to
// add to while others are still being added to.
template <int R, int V, int U>
AQT_TARGET void Tile(const uint8_t* lhs, int64_t row_bytes, const Panel& panel, int32_t* out,
                     int64_t stride) {
  __m512i sums[U][R][V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const __m512i offset = _mm512_loadu_si512(panel.offsets + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[0][r][v] = offset;
#pragma GCC unroll 16
    for (int u = 1; u < U; ++u) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[u][r][v] = _mm512_setzero_si512();
    }
  }
  const int8_t* rhs = panel.values;
  int64_t k = 0;
  for (; k + U * kGroup <= row_bytes; k += U * kGroup) {
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      __m512i values[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        values[v] = _mm512_loadu_si512(rhs + (u * V + v) * kGroup * kLanes);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i four = Broadcast(lhs + r * row_bytes + k + u * kGroup);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          sums[u][r][v] = _mm512_dpbusd_epi32(sums[u][r][v], four, values[v]);
        }
      }
    }
    rhs += U * V * kGroup * kLanes;
  }
  for (; k < row_bytes; k += kGroup, rhs += V * kGroup * kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i four = Broadcast(lhs + r * row_bytes + k);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        const __m512i values = _mm512_loadu_si512(rhs + v * kGroup * kLanes);
        sums[0][r][v] = _mm512_dpbusd_epi32(sums[0][r][v], four, values);
      }
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const int64_t left = std::clamp<int64_t>(panel.columns - v * kLanes, 0, kLanes);
    const auto mask = static_cast<__mmask16>((1u << left) - 1);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __m512i sum = sums[0][r][v];
#pragma GCC unroll 16
      for (int u = 1; u < U; ++u) sum = _mm512_add_epi32(sum, sums[u][r][v]);
      _mm512_mask_storeu_epi32(out + r * stride + v * kLanes, mask, sum);
    }
  }
}

using TileFunction = void (*)(const uint8_t*, int64_t, const Panel&, int32_t*, int64_t);

template <int V, int... R>
constexpr std::array<TileFunction, sizeof...(R)> Tiles(std::integer_sequence<int, R...>) {
  return {Tile<R + 1, V, R == 0 ? 4 : R < 3 ? 2 : 1>...};
}

void Multiply(const void* prepared, int64_t rows, int64_t depth, const Panel& panel, int32_t* out,
              int64_t stride) {
  static constexpr auto kWide = Tiles<2>(std::make_integer_sequence<int, kRows>());
  static constexpr auto kNarrow = Tiles<1>(std::make_integer_sequence<int, kRows>());
  const auto& tiles = panel.width == kPanel ? kWide : kNarrow;
  const auto* lhs = static_cast<const uint8_t*>(prepared);
  const int64_t row_bytes = RowBytes(depth);
  for (int64_t count = (rows + kRows - 1) / kRows; count > 0; --count) {
    const int64_t height = (rows + count - 1) / count;
    tiles[height - 1](lhs, row_bytes, panel, out, stride);
    rows -= height;
    lhs += height * row_bytes;
    out += height * stride;
  }
}

AQT_TARGET void Quantize(const Rows& rows) { QuantizeRows(rows); }

}  // namespace

const InstructionSet kAvx512Vnni = {"avx512vnni", Supported, RowBytes, 1, Prepare, Multiply,
                                    Quantize};

}  // namespace aqt
