#include "base/check.h"
#include "kernels/host/onednn.h"

namespace moed {

struct OneDnn::State {};

bool OneDnn::is_built() { return false; }

OneDnn::OneDnn(int, int32_t, int32_t) { MOED_CHECK(false) << "this build is without oneDNN"; }

OneDnn::~OneDnn() = default;

bool OneDnn::prepare(int32_t, int32_t) { return false; }

void OneDnn::run(const DotBlock&, bool, int) { MOED_CHECK(false) << "this build is without oneDNN"; }

}  // namespace moed
