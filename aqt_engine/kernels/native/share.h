// Pieces of work that several threads take.
#ifndef AQT_KERNELS_SHARE_H_
#define AQT_KERNELS_SHARE_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>

namespace aqt {

using Schedule = std::function<void(std::function<void()>)>;

// The numbers below `count`, each for whoever takes it first.
class Pieces {
 public:
  explicit Pieces(int64_t count) : count_(count) {}
  // The next one, or one that is not below `count` where there are no more.
  int64_t Take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  bool Is(int64_t piece) const { return piece < count_; }
  void Finish() { finished_.fetch_add(1, std::memory_order_release); }
  bool finished() const { return finished_.load(std::memory_order_acquire) == count_; }

 private:
  const int64_t count_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
};

// Has `work` take all of `count` pieces, in the calling thread and in up to `helpers` others that
// `schedule` finds. The caller never waits for one that has not begun: it works as long as there is
// work, and then waits for what others have taken. One that comes later finds nothing left, and what
// `work` holds is there until then.
inline void Share(int64_t count, int64_t helpers, const Schedule& schedule,
                  std::function<void(Pieces&)> work) {
  struct Shared {
    Pieces pieces;
    std::function<void(Pieces&)> work;
  };
  const auto shared = std::shared_ptr<Shared>(new Shared{Pieces(count), std::move(work)});
  for (int64_t i = 0; i < std::min(helpers, count - 1); ++i) {
    schedule([shared] { shared->work(shared->pieces); });
  }
  shared->work(shared->pieces);
  while (!shared->pieces.finished()) std::this_thread::yield();
}

}  // namespace aqt

#endif  // AQT_KERNELS_SHARE_H_
