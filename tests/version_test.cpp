#include <nearfar/version.hpp>

#include <gtest/gtest.h>

#include <string>

#include "support/text.hpp"

namespace {

TEST(Version, OfCMakeIsThatOfTheHeader) {
  const std::string header =
      TEXT(NEARFAR_VERSION_MAJOR) "." TEXT(NEARFAR_VERSION_MINOR) "." TEXT(NEARFAR_VERSION_PATCH);
  EXPECT_EQ(NEARFAR_CMAKE_VERSION, header);
}

TEST(Version, NamesTheInlineNamespaceTogetherWithTheInstructionSet) {
  const std::string expected =
      "v" TEXT(NEARFAR_VERSION_MAJOR) "_" TEXT(NEARFAR_VERSION_MINOR) "_" TEXT(NEARFAR_INSTRUCTION_SET);
  EXPECT_EQ(TEXT(NEARFAR_VERSION_NAMESPACE), expected);
}

}  // namespace
