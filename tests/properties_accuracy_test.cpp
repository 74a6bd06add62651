#include "subjects/properties.hpp"

// What float loses against double, over many keys.

namespace nearfar::test {
namespace {

class Accuracy : public Property {};

INSTANTIATE_TEST_SUITE_P(All, Accuracy, ::testing::ValuesIn(subject_cases()), subject_name);

TEST_P(Accuracy, HoldsInFloatOver8192Keys) {
  const Heads heads{.query = 1, .key_value = 1, .dim = 64};
  const Index keys = 8192;
  const auto in_float = GetParam().make<float>(heads);
  const auto in_double = GetParam().make<double>(heads);
  // Both compute with the numbers that float holds.
  std::map<std::string, Matrix<double>> parameters;
  in_float->each_parameter([&](const auto& name, Matrix<float>& matrix) { parameters[name] = matrix.cast<double>(); });
  in_double->each_parameter([&](const auto& name, Matrix<double>& matrix) { matrix = parameters.at(name); });
  // 64 queries are looked at; where they may be alone, the work of all n x n pairs is spared.
  const Index queries = 64;
  const auto sample = random_sample<float>(heads, any_shape() ? queries : keys, 8192, keys);
  const auto some = Eigen::seqN(0, queries, sample.query.rows() / queries);
  const auto all = Eigen::seqN(0, heads.out_cols());
  const Matrix<double> expected = run_forward(*in_double, cast<double>(sample))(some, all);
  const Matrix<float> actual = run_forward(*in_float, sample)(some, all);
  EXPECT_TRUE(rows_close(actual, expected, GetParam().accuracy));
}

}  // namespace
}  // namespace nearfar::test
