#pragma once

#include <string>
#include <string_view>

#include "base/status.h"
#include "model/architectures.h"

namespace moed {

// Published models by their config.json's fields, for benchmarks and plans that need no weights. Errors:
// kInvalidArgument listing the names.
StatusOr<Model> model_of_shape(std::string_view name);
// "mixtral-8x7b, olmoe-1b-7b, ..."
std::string model_shape_names();

}  // namespace moed
