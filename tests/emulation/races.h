// Data races: two accesses of one byte, a write among them, that no barrier and no flag puts in
// order. They are found by what orders them, not by their happening the wrong way round.
//
// Every thread has a clock, and knows of every other up to which of its moments all has happened
// before. Barriers and flags pass such knowledge on; of every byte the last accesses are kept.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

namespace gatedrnn::emulation {

struct Access {
  const void* code = nullptr;  // its place there; null: no access
  uint32_t thread = 0;         // numbered over the whole launch, in the order of blocks
  uint32_t writes : 1 = false, is_atomic : 1 = false;
  uint32_t bytes : 4 = 0;  // a bit for each of a word
  uint32_t moment : 26 = 0;
};

class Races {
 public:
  // The next `count` threads; nobody has touched their shared memory.
  void start(size_t count, const void* shared, size_t shared_bytes);
  // They have ended, the first of them `first`: what they knew is of use to nobody.
  void end(size_t first, size_t count, const void* shared, size_t shared_bytes);

  // What one of them did before, all know after.
  void meet(const std::vector<uint32_t>& threads);
  void acquire(uint32_t thread, const void* flag);
  void release(uint32_t thread, const void* flag);
  // By an addition, besides what is released there already.
  void release_too(uint32_t thread, const void* counter);

  // Of these bytes. Returns an earlier access that nothing puts before this one.
  std::optional<Access> access(const void* begin, size_t bytes, Access now);

 private:
  // The last moment known of each thread; of none before `first`, which mostly is the block's own.
  struct Clock {
    size_t first = 0;
    std::vector<uint32_t> moments;
    uint32_t of(size_t thread) const {
      return thread - first < moments.size() ? moments[thread - first] : 0;
    }
    uint32_t& at(size_t thread);
    void learn(const Clock& more);
  };
  using Known = std::shared_ptr<const Clock>;
  struct Thread {
    uint32_t moment = 1;
    Known known;
  };
  // The last accesses of four bytes. Of more than these some are forgotten: a race may be missed,
  // none is made up.
  using Word = std::array<Access, 4>;
  static constexpr size_t kWord = 4, kPage = 1024;  // bytes, words

  Known until_now(uint32_t thread) const;
  Word& word(uintptr_t number);
  const Access* access(Word& word, const Access& now, const Clock& known);

  std::vector<Thread> threads_;
  std::unordered_map<const void*, Known> released_;
  std::unordered_map<uintptr_t, std::unique_ptr<Word[]>> pages_;
  uintptr_t last_page_ = 0;
  Word* last_words_ = nullptr;
  uint32_t forgotten_ = 0;
};

}  // namespace gatedrnn::emulation
