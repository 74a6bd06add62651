#include "support/golden.hpp"

// Every file of the golden folder, held by the mechanism it names in double and in float. The mechanisms' runners stand
// in golden_<mechanism>.cpp.

namespace nearfar::test {
namespace {

GoldenRunners runners_of(GoldenCase& golden) {
  const std::string& mechanism = golden.word("mechanism");
  const auto found = golden_runners().find(mechanism);
  golden.require(found != golden_runners().end(), "the mechanism ", mechanism, " is unknown.");
  return found->second;
}

class Golden : public ::testing::TestWithParam<std::filesystem::path> {};

TEST_P(Golden, HoldsInDouble) {
  GoldenCase golden(GetParam());
  runners_of(golden).in_double(golden);
}

TEST_P(Golden, HoldsInFloat) {
  GoldenCase golden(GetParam());
  runners_of(golden).in_float(golden);
}

INSTANTIATE_TEST_SUITE_P(Case, Golden, ::testing::ValuesIn(golden_files()),
                         [](const auto& file) { return golden_test_name(file.param); });

TEST(GoldenFolder, HoldsCases) { EXPECT_FALSE(golden_files().empty()) << "no case in " << golden_folder(); }

}  // namespace
}  // namespace nearfar::test
