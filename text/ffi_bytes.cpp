#include "text/ffi_bytes.h"

namespace moed {

Status ffi_status(int32_t code, const FfiBytes& message) {
  switch (code) {
    case MOED_TEXT_OK:
      return Status();
    case MOED_TEXT_INVALID_ARGUMENT:
      return invalid_argument(message.str());
    case MOED_TEXT_NOT_FOUND:
      return Status(StatusCode::kNotFound, message.str());
    default:
      return internal_error(message.str());
  }
}

}  // namespace moed
