// The instruction sets this build and this machine have in common.
#pragma once

#include <vector>

#include "kernels.h"

namespace coppice {

std::vector<const Table*> runnable_tables();  // best first; the portable one is last

}  // namespace coppice
