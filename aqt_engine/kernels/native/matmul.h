// The product of int8 rows with a packed matrix, shared among threads.
#ifndef AQT_KERNELS_MATMUL_H_
#define AQT_KERNELS_MATMUL_H_

#include <cstdint>

#include "instruction_set.h"
#include "share.h"

namespace aqt {

struct Product {
  const int8_t* lhs;      // rows x depth
  const int8_t* packed;   // depth x columns, as `instruction_set.h` has it
  int32_t* out;           // rows x columns
  int64_t rows;
  int64_t depth;
  int64_t columns;
};

// Bytes of a packed matrix.
int64_t PackedBytes(int64_t depth, int64_t columns);

// Computes `product` in the calling thread, and in up to `helpers` others, as `Share` does.
void Multiply(const Product& product, const InstructionSet& with, int64_t helpers,
              const Schedule& schedule);

}  // namespace aqt

#endif  // AQT_KERNELS_MATMUL_H_
