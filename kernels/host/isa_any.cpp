#include "kernels/host/isa.h"

namespace moed {
namespace {

constexpr Isa kIsas[] = {{"portable", &portable_kernels, [] { return true; }, false}};

}  // namespace

IsaList isas() { return {kIsas, 1}; }

}  // namespace moed
