#include "text/ffi_bytes.h"

#include <gtest/gtest.h>

namespace moed {
namespace {

TEST(FfiTest, AFaultBehindTheInterfaceComesBackAsAStatus) {
  for (int i = 0; i < 2; ++i) {
    FfiBytes message;
    const Status status = ffi_status(moed_text_test_panic(message.out()), message);
    EXPECT_EQ(status.code(), StatusCode::kInternal);
    EXPECT_NE(status.message().find("fault in the tokenizer and template library"), std::string::npos)
        << status.message();
  }
}

}  // namespace
}  // namespace moed
