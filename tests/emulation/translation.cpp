#include "translation.h"

#include <map>
#include <stdexcept>
#include <utility>

namespace gatedrnn::emulation {
namespace {

using Key = std::pair<const void*, std::vector<size_t>>;

std::map<Key, TranslatedKernel>& translations() {
  static std::map<Key, TranslatedKernel> all;
  return all;
}

}  // namespace

Translation::Translation(void (*kernel)(), TranslatedKernel translated,
                         std::vector<size_t> parameter_bytes) {
  translations()[{reinterpret_cast<const void*>(kernel), std::move(parameter_bytes)}] = translated;
}

TranslatedKernel translated(const void* kernel, const std::vector<size_t>& parameter_bytes) {
  if (translations().empty()) return nullptr;
  const auto found = translations().find({kernel, parameter_bytes});
  if (found == translations().end())
    throw std::runtime_error("emulated launch: the kernel is not translated");
  return found->second;
}

}  // namespace gatedrnn::emulation
