// Fresh results in huge pages: a page fault for every 4 kB costs more than the scan of what it
// holds.
#pragma once

#include <cstdint>

namespace gatedrnn {

// Asks for huge pages where whole ones lie within the memory; what is there already stays as it is.
// Costs next to nothing where it changes nothing, and may be refused.
void ask_for_huge_pages(void* memory, int64_t bytes);

}  // namespace gatedrnn
