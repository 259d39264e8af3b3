#include "races.h"

#include <algorithm>

namespace gatedrnn::emulation {

uint32_t& Races::Clock::at(size_t thread) {
  if (moments.empty()) first = thread;
  if (thread < first) {
    moments.insert(moments.begin(), first - thread, 0);
    first = thread;
  }
  if (thread - first >= moments.size()) moments.resize(thread - first + 1);
  return moments[thread - first];
}

void Races::Clock::learn(const Clock& more) {
  if (more.moments.empty()) return;
  at(more.first), at(more.first + more.moments.size() - 1);  // makes room
  uint32_t* const own = &at(more.first);
  for (size_t i = 0; i < more.moments.size(); ++i) own[i] = std::max(own[i], more.moments[i]);
}

void Races::start(size_t count, const void* shared, size_t shared_bytes) {
  static const Known nothing = std::make_shared<Clock>();
  threads_.resize(threads_.size() + count, Thread{1, nothing});
  const auto begin = reinterpret_cast<uintptr_t>(shared), end = begin + shared_bytes;
  for (uintptr_t page = begin / kWord / kPage; page * kPage * kWord < end; ++page)
    if (const auto found = pages_.find(page); found != pages_.end())
      std::fill_n(found->second.get(), kPage, Word{});
}

void Races::end(size_t first, size_t count, const void* shared, size_t shared_bytes) {
  for (size_t i = first; i < first + count; ++i) threads_[i].known.reset();
  // The next block's shared memory may lie there.
  const auto begin = static_cast<const char*>(shared);
  std::erase_if(released_, [&](const auto& flag) {
    return flag.first >= begin && flag.first < begin + shared_bytes;
  });
}

Races::Known Races::until_now(uint32_t thread) const {
  auto clock = std::make_shared<Clock>(*threads_[thread].known);
  clock->at(thread) = threads_[thread].moment;
  return clock;
}

void Races::meet(const std::vector<uint32_t>& threads) {
  const Known* learnt = &threads_[threads.front()].known;
  auto all = std::make_shared<Clock>(**learnt);
  for (uint32_t i : threads) {
    if (threads_[i].known != *learnt) {  // as after their last meeting it mostly is
      learnt = &threads_[i].known;
      all->learn(**learnt);
    }
  }
  for (uint32_t i : threads) all->at(i) = threads_[i].moment++;
  for (uint32_t i : threads) threads_[i].known = all;
}

void Races::acquire(uint32_t thread, const void* flag) {
  const auto found = released_.find(flag);
  if (found == released_.end()) return;
  auto clock = std::make_shared<Clock>(*threads_[thread].known);
  clock->learn(*found->second);
  threads_[thread].known = clock;
}

void Races::release(uint32_t thread, const void* flag) {
  released_[flag] = until_now(thread);
  ++threads_[thread].moment;
}

void Races::release_too(uint32_t thread, const void* counter) {
  Known& released = released_[counter];
  auto clock = std::make_shared<Clock>(*until_now(thread));
  if (released) clock->learn(*released);
  released = clock;
  ++threads_[thread].moment;
}

std::optional<Access> Races::access(const void* begin, size_t bytes, Access now) {
  now.moment = threads_[now.thread].moment;
  const Clock& known = *threads_[now.thread].known;
  const auto first = reinterpret_cast<uintptr_t>(begin), end = first + bytes;
  for (uintptr_t number = first / kWord; number * kWord < end; ++number) {
    const uintptr_t from = std::max(first, number * kWord) % kWord;
    const uintptr_t to = std::min(end - number * kWord, kWord);
    now.bytes = (1u << to) - (1u << from);
    if (const Access* earlier = access(word(number), now, known)) return *earlier;
  }
  return std::nullopt;
}

const Access* Races::access(Word& word, const Access& now, const Clock& known) {
  // Of an access that is not needed any more: who comes after `now` comes after it.
  Access* place = nullptr;
  for (Access& earlier : word) {
    if (!earlier.code) {
      if (!place) place = &earlier;
      break;  // only empty ones follow
    }
    const bool is_before =
        earlier.thread == now.thread || earlier.moment <= known.of(earlier.thread);
    if (!is_before && earlier.bytes & now.bytes && (earlier.writes || now.writes) &&
        !(earlier.is_atomic && now.is_atomic))
      return &earlier;
    if (is_before && !(earlier.bytes & ~now.bytes) && earlier.writes <= now.writes &&
        earlier.is_atomic >= now.is_atomic)
      place = &earlier;
  }
  // What is forgotten for want of room is a read if there is one.
  for (size_t i = 0; !place; ++i) {
    Access& other = word[forgotten_++ % word.size()];
    if (!other.writes || i >= word.size()) place = &other;
  }
  *place = now;
  return nullptr;
}

Races::Word& Races::word(uintptr_t number) {
  const uintptr_t page = number / kPage;
  if (!last_words_ || page != last_page_) {
    auto& words = pages_[page];
    if (!words) words = std::make_unique<Word[]>(kPage);
    last_page_ = page, last_words_ = words.get();
  }
  return last_words_[number % kPage];
}

}  // namespace gatedrnn::emulation
