#include "subjects/properties.hpp"

// A stream gives the rows that forward gives for the whole sequence, however the tokens arrive.

namespace nearfar::test {
namespace {

class Streams : public Property {
 protected:
  void SetUp() override {
    if (!make<double>()->can_stream()) GTEST_SKIP() << "no stream with these options";
  }

  /// The results of pieces of these lengths, the last of them as long as is left.
  template <class T>
  static Matrix<T> stream(Subject<T>& subject, const Sample<T>& sample, const std::vector<Index>& pieces) {
    const Index n = sample.query.rows();
    Matrix<T> out = Matrix<T>::Constant(n, subject.heads().out_cols(), std::numeric_limits<T>::quiet_NaN());
    Context context(2);
    subject.start();
    for (Index first = 0, piece = 0; first < n; ++piece) {
      const Index wanted = pieces[static_cast<std::size_t>(piece) % pieces.size()];
      const Index count = std::min(wanted, n - first);
      Inputs<T> inputs{sample.query.middleRows(first, count), sample.key.middleRows(first, count),
                       sample.value.middleRows(first, count)};
      if (!sample.key_mask.empty()) {
        inputs.key_mask = {sample.key_mask.data() + first, static_cast<std::size_t>(count)};
      }
      subject.extend(inputs, out.middleRows(first, count), context);
      first += count;
    }
    return out;
  }
};

INSTANTIATE_TEST_SUITE_P(All, Streams, ::testing::ValuesIn(subject_cases()), subject_name);

TEST_P(Streams, AreAsForwardHoweverTheTokensArrive) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const Index n : {1, 5, 150}) {
      for (const bool masked : {false, true}) {
        auto sample = masked_sample<T>(n, 1000);
        if (!masked) sample.key_mask.clear();
        const Matrix<T> expected = run_forward(*subject, sample);
        for (const std::vector<Index>& pieces : {std::vector<Index>{1}, {n}, {3}, {0, 64, 1}, {1, 2, 3, 0, 33}}) {
          EXPECT_TRUE(close(stream(*subject, sample, pieces), expected, tolerance<T>()))
              << "n = " << n << ", pieces of " << pieces.front() << ", masked " << masked;
        }
      }
    }
  });
}

TEST_P(Streams, MayBeginWithMaskedKeys) {
  const auto subject = make<double>();
  auto sample = masked_sample<double>(40, 1001);
  std::fill_n(sample.key_mask.begin(), 20, std::uint8_t{0});
  if (!GetParam().masked_token_reads_itself) poison_masked_keys(sample);
  EXPECT_TRUE(close(stream(*subject, sample, {1}), run_forward(*subject, sample), tolerance<double>()));
}

}  // namespace
}  // namespace nearfar::test
