// AMX: tiles of 16 rows of 64 bytes, multiplied as signed bytes.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "instruction_set.h"

#define AQT_TARGET __attribute__((target("amx-tile,amx-int8,avx512f")))

namespace aqt {
namespace {

constexpr int64_t kRows = 16;
constexpr int64_t kColumns = 16;

// Asks Linux to let this process use the tiles' registers, which are not saved for it otherwise.
bool Permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool Supported() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  return (d & kTile) != 0 && (d & kInt8) != 0 && __builtin_cpu_supports("avx512f") && Permitted();
}

int64_t RowBytes(int64_t depth) { return RoundUp(depth, kDepth); }

void Prepare(const int8_t* lhs, int64_t rows, int64_t depth, void* prepared) {
  auto* out = static_cast<int8_t*>(prepared);
  const int64_t row_bytes = RowBytes(depth);
  for (int64_t r = 0; r < rows; ++r, lhs += depth, out += row_bytes) {
    std::memcpy(out, lhs, depth);
    std::memset(out + depth, 0, row_bytes - depth);
  }
  std::memset(out, 0, (RoundUp(rows, kRows) - rows) * row_bytes);
}

struct alignas(64) Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void Copy(const int32_t* tile, int64_t rows, int64_t columns, int32_t* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(out + r * stride, tile + r * kColumns, columns * sizeof(int32_t));
  }
}

// 32 rows and 32 columns: tiles 0 to 3 are sums, 4 and 5 rows of the left, 6 and 7 columns.
AQT_TARGET void Square(const int8_t* lhs, int64_t row_bytes, const Panel& panel, int64_t rows,
                       int32_t* out, int64_t stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int8_t* rhs = panel.values;
  for (int64_t k = 0; k < row_bytes; k += kDepth, rhs += kDepth * kPanel) {
    _tile_loadd(6, rhs, kPanel * kGroup);
    _tile_loadd(7, rhs + kColumns * kGroup, kPanel * kGroup);
    _tile_loadd(4, lhs + k, row_bytes);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, lhs + kRows * row_bytes + k, row_bytes);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  alignas(64) int32_t tiles[4][kRows * kColumns];
  _tile_stored(0, tiles[0], kColumns * sizeof(int32_t));
  _tile_stored(1, tiles[1], kColumns * sizeof(int32_t));
  _tile_stored(2, tiles[2], kColumns * sizeof(int32_t));
  _tile_stored(3, tiles[3], kColumns * sizeof(int32_t));
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t columns = std::clamp<int64_t>(panel.columns - half * kColumns, 0, kColumns);
    Copy(tiles[half], kRows, columns, out + half * kColumns, stride);
    Copy(tiles[2 + half], rows - kRows, columns, out + kRows * stride + half * kColumns, stride);
  }
}

// At most 16 rows.
AQT_TARGET void Strip(const int8_t* lhs, int64_t row_bytes, const Panel& panel, int64_t rows,
                      int32_t* out, int64_t stride) {
  for (int64_t column = 0; column < panel.columns; column += kColumns) {
    _tile_zero(0);
    const int8_t* rhs = panel.values + column * kGroup;
    for (int64_t k = 0; k < row_bytes; k += kDepth, rhs += kDepth * panel.width) {
      _tile_loadd(6, rhs, panel.width * kGroup);
      _tile_loadd(4, lhs + k, row_bytes);
      _tile_dpbssd(0, 4, 6);
    }
    alignas(64) int32_t tile[kRows * kColumns];
    _tile_stored(0, tile, kColumns * sizeof(int32_t));
    Copy(tile, rows, std::min(kColumns, panel.columns - column), out + column, stride);
  }
}

AQT_TARGET void Multiply(const void* prepared, int64_t rows, int64_t depth, const Panel& panel,
                         int32_t* out, int64_t stride) {
  const Configuration configuration;
  _tile_loadconfig(&configuration);
  const auto* lhs = static_cast<const int8_t*>(prepared);
  const int64_t row_bytes = RowBytes(depth);
  for (int64_t row = 0; row < rows;) {
    const int64_t left = rows - row;
    if (left > kRows && panel.width == kPanel) {
      const int64_t height = std::min(left, 2 * kRows);
      Square(lhs + row * row_bytes, row_bytes, panel, height, out + row * stride, stride);
      row += height;
    } else {
      const int64_t height = std::min(left, kRows);
      Strip(lhs + row * row_bytes, row_bytes, panel, height, out + row * stride, stride);
      row += height;
    }
  }
  _tile_release();
}

AQT_TARGET void Quantize(const Rows& rows) { QuantizeRows(rows); }

}  // namespace

const InstructionSet kAmx = {"amx", Supported, RowBytes, kRows, Prepare, Multiply,
                             Quantize};

}  // namespace aqt
