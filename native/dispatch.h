// Which kernel set this CPU runs.
#pragma once

#include <string_view>
#include <vector>

#include "kernels/kernels.h"

namespace bitllm {

// The best set that this CPU runs.
const Kernels& best_kernels();

// The set of that name; null where this build does not contain it or this CPU cannot run it.
const Kernels* find_kernels(std::string_view name);

// All sets that this CPU runs, best first.
const std::vector<const Kernels*>& available_kernels();

}  // namespace bitllm
