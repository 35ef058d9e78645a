#include "matmul.h"

#include <algorithm>
#include <cstdlib>

namespace aqt {
namespace {

// Products of one piece of work at least: what is computed while a thread that sleeps wakes up to
// help. Four rows by 1024x1024 are one piece.
constexpr int64_t kSmallestPiece = 4 << 20;
// Bytes of prepared rows that leave room for panels in a core's own cache.
constexpr int64_t kBlockBytes = 192 << 10;
constexpr int64_t kMostRows = 96;
constexpr int64_t kPiecesOfThread = 4;

// Memory of a thread for prepared rows, kept for the next product.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  void* OfBytes(int64_t bytes) {
    if (bytes > bytes_) {
      std::free(memory_);
      bytes_ = RoundUp(bytes, 64);
      memory_ = std::aligned_alloc(64, bytes_);
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// A product in pieces: blocks of rows, times runs of panels.
class Work {
 public:
  Work(const Product& product, const InstructionSet& with, int64_t threads)
      : product_(product), with_(with) {
    const int64_t fitting = kBlockBytes / std::max<int64_t>(1, with.row_bytes(product.depth));
    const int64_t most = std::clamp(fitting, std::min(kMostRows, 2 * with.row_multiple + 10),
                                    kMostRows);
    const int64_t blocks = (product.rows + most - 1) / most;
    block_rows_ = RoundUp((product.rows + blocks - 1) / blocks, with.row_multiple);
    blocks_ = (product.rows + block_rows_ - 1) / block_rows_;
    panels_ = (product.columns + kPanel - 1) / kPanel;
    const int64_t panel_products = block_rows_ * std::max<int64_t>(1, product.depth) * kPanel;
    const int64_t least = std::max<int64_t>(1, kSmallestPiece / panel_products);
    const int64_t wanted = threads == 1 ? 1 : (kPiecesOfThread * threads + blocks_ - 1) / blocks_;
    run_ = std::max(least, (panels_ + wanted - 1) / wanted);
    runs_ = (panels_ + run_ - 1) / run_;
  }

  int64_t pieces() const { return blocks_ * runs_; }

  // Takes pieces as long as there are any.
  void Take(Pieces& pieces) const {
    static thread_local Scratch scratch;
    const int64_t row_bytes = with_.row_bytes(product_.depth);
    void* prepared = nullptr;
    int64_t of_block = -1;
    for (int64_t i; pieces.Is(i = pieces.Take());) {
      const int64_t block = i / runs_, run = i % runs_;
      const int64_t row = block * block_rows_;
      const int64_t rows = std::min(block_rows_, product_.rows - row);
      if (block != of_block) {
        prepared = scratch.OfBytes(block_rows_ * row_bytes);
        with_.prepare(product_.lhs + row * product_.depth, rows, product_.depth, prepared);
        of_block = block;
      }
      const int64_t end = std::min(panels_, (run + 1) * run_);
      for (int64_t p = run * run_; p < end; ++p) {
        with_.multiply(prepared, rows, product_.depth, PanelAt(p),
                       product_.out + row * product_.columns + p * kPanel, product_.columns);
      }
      pieces.Finish();
    }
  }

 private:
  Panel PanelAt(int64_t index) const {
    const int64_t depth = RoundUp(product_.depth, kDepth);
    const int64_t padded = RoundUp(product_.columns, kPanel / 2);
    const int64_t column = index * kPanel;
    const auto* offsets = reinterpret_cast<const int32_t*>(product_.packed + depth * padded);
    return {product_.packed + column * depth, offsets + column, std::min(kPanel, padded - column),
            std::min(kPanel, product_.columns - column)};
  }

  const Product product_;
  const InstructionSet& with_;
  int64_t block_rows_, blocks_, panels_, run_, runs_;
};

}  // namespace

int64_t PackedBytes(int64_t depth, int64_t columns) {
  const int64_t padded = RoundUp(columns, kPanel / 2);
  return padded * (RoundUp(depth, kDepth) + static_cast<int64_t>(sizeof(int32_t)));
}

void Multiply(const Product& product, const InstructionSet& with, int64_t helpers,
              const Schedule& schedule) {
  if (product.rows == 0 || product.columns == 0) return;
  const Work work(product, with, helpers + 1);
  Share(work.pieces(), helpers, schedule, [work](Pieces& pieces) { work.Take(pieces); });
}

}  // namespace aqt
