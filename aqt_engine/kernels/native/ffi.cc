// What XLA calls, and what Python asks.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "instruction_set.h"
#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

const aqt::InstructionSet* const kAll[] = {&aqt::kAmx, &aqt::kAvx512Vnni, &aqt::kAvx2};
std::atomic<const aqt::InstructionSet*> used{nullptr};

const aqt::InstructionSet* Find(const char* name) {
  for (const auto* each : kAll) {
    if (std::strcmp(each->name, name) == 0) return each;
  }
  return nullptr;
}

ffi::Error Int8Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> lhs, ffi::Buffer<ffi::S8> packed,
                      ffi::ResultBuffer<ffi::S32> out, int64_t depth, int64_t columns) {
  const aqt::InstructionSet* with = used.load();
  if (with == nullptr) return ffi::Error::Internal("no instruction set was chosen");
  const int64_t values = static_cast<int64_t>(out->element_count());
  const int64_t rows = columns == 0 ? 0 : values / columns;
  if (rows * columns != values || static_cast<int64_t>(lhs.element_count()) != rows * depth ||
      static_cast<int64_t>(packed.element_count()) != aqt::PackedBytes(depth, columns)) {
    return ffi::Error::InvalidArgument("the operands do not fit " + std::to_string(depth) + " x " +
                                       std::to_string(columns));
  }
  aqt::Multiply({lhs.typed_data(), packed.typed_data(), out->typed_data(), rows, depth, columns},
                *with, pool.num_threads() - 1,
                [&](std::function<void()> task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

// Values of one piece of work at least: what is quantized while a thread that sleeps wakes up.
constexpr int64_t kSmallestPiece = 1 << 17;

void Quantize(const aqt::Rows& all, const aqt::InstructionSet& with, int64_t helpers,
              const aqt::Schedule& schedule) {
  const int64_t rows = std::max<int64_t>(1, kSmallestPiece / std::max<int64_t>(1, all.depth));
  const int64_t count = (all.rows + rows - 1) / rows;
  aqt::Share(count, helpers, schedule, [all, &with, rows](aqt::Pieces& pieces) {
    for (int64_t i; pieces.Is(i = pieces.Take());) {
      with.quantize(all.From(i * rows, std::min(rows, all.rows - i * rows)));
      pieces.Finish();
    }
  });
}

ffi::Error QuantizeRows(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> values,
                        ffi::ResultBuffer<ffi::S8> quantized,
                        ffi::ResultBuffer<ffi::F32> scales, float factor, float bound) {
  const aqt::InstructionSet* with = used.load();
  if (with == nullptr) return ffi::Error::Internal("no instruction set was chosen");
  const int64_t count = static_cast<int64_t>(values.element_count());
  const int64_t rows = static_cast<int64_t>(scales->element_count());
  const int64_t depth = rows == 0 ? 0 : count / rows;
  if (rows * depth != count || static_cast<int64_t>(quantized->element_count()) != count) {
    return ffi::Error::InvalidArgument(std::to_string(count) + " values do not fit " +
                                       std::to_string(rows) + " scales");
  }
  Quantize({values.typed_data(), quantized->typed_data(), scales->typed_data(), rows, depth, factor,
            bound},
           *with, pool.num_threads() - 1,
           [&](std::function<void()> task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace

// Whether this processor has the instruction set of that name.
extern "C" bool aqt_supported(const char* name) {
  const aqt::InstructionSet* found = Find(name);
  return found != nullptr && found->supported();
}

// Computes with the instruction set of that name from now on; it has to be supported.
extern "C" void aqt_use(const char* name) { used.store(Find(name)); }

// One product, in so many threads, with an instruction set that has to be supported.
extern "C" void aqt_multiply(const char* name, int64_t threads, const int8_t* lhs,
                             const int8_t* packed, int32_t* out, int64_t rows, int64_t depth,
                             int64_t columns) {
  std::vector<std::thread> others;
  aqt::Multiply({lhs, packed, out, rows, depth, columns}, *Find(name), threads - 1,
                [&](std::function<void()> task) { others.emplace_back(std::move(task)); });
  for (std::thread& other : others) other.join();
}

// Quantizes rows, in so many threads, with an instruction set that has to be supported.
extern "C" void aqt_quantize(const char* name, int64_t threads, const float* values,
                             int8_t* quantized, float* scales, int64_t rows, int64_t depth,
                             float factor, float bound) {
  std::vector<std::thread> others;
  Quantize({values, quantized, scales, rows, depth, factor, bound}, *Find(name), threads - 1,
           [&](std::function<void()> task) { others.emplace_back(std::move(task)); });
  for (std::thread& other : others) other.join();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(aqt_quantize_rows, QuantizeRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("factor")
                                  .Attr<float>("bound"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(aqt_int8_matmul, Int8Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("depth")
                                  .Attr<int64_t>("columns"));
