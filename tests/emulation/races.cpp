#include "races.h"

#include <algorithm>

namespace gatedrnn::emulation {
namespace {

void learn(std::vector<uint32_t>& clock, const std::vector<uint32_t>& more) {
  if (clock.size() < more.size()) clock.resize(more.size());
  for (size_t i = 0; i < more.size(); ++i) clock[i] = std::max(clock[i], more[i]);
}

}  // namespace

void Races::start(size_t count, const void* shared, size_t shared_bytes) {
  static const Known nothing = std::make_shared<Clock>();
  threads_.resize(threads_.size() + count, Thread{1, nothing});
  const auto begin = reinterpret_cast<uintptr_t>(shared), end = begin + shared_bytes;
  for (uintptr_t page = begin / kWord / kPage; page * kPage * kWord < end; ++page)
    if (const auto found = pages_.find(page); found != pages_.end())
      std::fill_n(found->second.get(), kPage, Word{});
}

Races::Known Races::until_now(uint32_t thread) const {
  auto clock = std::make_shared<Clock>(*threads_[thread].known);
  if (clock->size() <= thread) clock->resize(thread + 1);
  (*clock)[thread] = threads_[thread].moment;
  return clock;
}

void Races::meet(const std::vector<uint32_t>& threads) {
  const uint32_t last = *std::max_element(threads.begin(), threads.end());
  const Known* learnt = &threads_[threads.front()].known;
  auto all = std::make_shared<Clock>(**learnt);
  if (all->size() <= last) all->resize(last + 1);
  for (uint32_t i : threads) {
    if (threads_[i].known != *learnt) {  // as after their last meeting it mostly is
      learnt = &threads_[i].known;
      learn(*all, **learnt);
    }
  }
  for (uint32_t i : threads) (*all)[i] = threads_[i].moment++;
  for (uint32_t i : threads) threads_[i].known = all;
}

void Races::acquire(uint32_t thread, const void* flag) {
  const auto found = released_.find(flag);
  if (found == released_.end()) return;
  auto clock = std::make_shared<Clock>(*threads_[thread].known);
  learn(*clock, *found->second);
  threads_[thread].known = clock;
}

void Races::release(uint32_t thread, const void* flag) {
  released_[flag] = until_now(thread);
  ++threads_[thread].moment;
}

void Races::release_too(uint32_t thread, const void* counter) {
  Known& released = released_[counter];
  auto clock = std::make_shared<Clock>(*until_now(thread));
  if (released) learn(*clock, *released);
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
        earlier.thread == now.thread ||
        (earlier.thread < known.size() && earlier.moment <= known[earlier.thread]);
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
