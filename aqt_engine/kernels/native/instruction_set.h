// How one instruction set multiplies int8 matrices, and the layout that all of them read.
#ifndef AQT_KERNELS_INSTRUCTION_SET_H_
#define AQT_KERNELS_INSTRUCTION_SET_H_

#include <cstddef>
#include <cstdint>

#include "quantize.h"

namespace aqt {

// A packed right operand of K x N: panels of kPanel columns, the last one of kPanel or kPanel / 2.
// In a panel lie groups of kGroup rows one after the other, and in a group its columns, each with
// its kGroup values. K is filled up with zeros to a multiple of kDepth, N to one of kPanel / 2.
// Behind the panels lies an int32 for each column: its sum, times -128. `packing.py` writes it.
inline constexpr int64_t kPanel = 32;
inline constexpr int64_t kGroup = 4;
inline constexpr int64_t kDepth = 64;

inline constexpr int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A panel: `columns` of its `width` columns are wanted.
struct Panel {
  const int8_t* values;
  const int32_t* offsets;
  int64_t width;
  int64_t columns;
};

struct InstructionSet {
  const char* name;
  // Whether this processor, and its operating system, have it.
  bool (*supported)();
  // Bytes that one row of `depth` values takes when it is prepared, and to how many rows a block is
  // filled up.
  int64_t (*row_bytes)(int64_t depth);
  int64_t row_multiple;
  // Writes `rows` rows of `depth` values as `multiply` reads them.
  void (*prepare)(const int8_t* lhs, int64_t rows, int64_t depth, void* prepared);
  // Writes the products of prepared rows with a panel, rows of `out` being `stride` values apart.
  void (*multiply)(const void* prepared, int64_t rows, int64_t depth, const Panel& panel,
                   int32_t* out, int64_t stride);
  // Quantizes rows.
  void (*quantize)(const Rows& rows);
};

extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512Vnni;
extern const InstructionSet kAmx;

}  // namespace aqt

#endif  // AQT_KERNELS_INSTRUCTION_SET_H_
