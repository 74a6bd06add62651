#include "subjects/properties.hpp"

// A stream gives the rows that forward gives for the whole sequence, however the tokens arrive.

namespace nearfar::test {
namespace {

class Streams : public Property {
 protected:
  void SetUp() override {
    if (!make<double>()->can_stream()) GTEST_SKIP() << "no stream with these options";
  }

  /// Appends tokens [first, first + count) of a sample, and writes their rows of out.
  template <class T>
  static void extend(Subject<T>& subject, const Sample<T>& sample, Index first, Index count, Matrix<T>& out,
                     Context& context) {
    Inputs<T> inputs{sample.query.middleRows(first, count), sample.key.middleRows(first, count),
                     sample.value.middleRows(first, count)};
    if (!sample.key_mask.empty()) {
      inputs.key_mask = {sample.key_mask.data() + first, static_cast<std::size_t>(count)};
    }
    subject.extend(inputs, out.middleRows(first, count), context);
  }

  template <class T>
  static Matrix<T> unwritten(const Subject<T>& subject, Index n) {
    return Matrix<T>::Constant(n, subject.heads().out_cols(), std::numeric_limits<T>::quiet_NaN());
  }

  /// The results of pieces of these lengths, the last of them as long as is left.
  template <class T>
  static Matrix<T> stream(Subject<T>& subject, const Sample<T>& sample, const std::vector<Index>& pieces,
                          int threads = 2) {
    const Index n = sample.query.rows();
    Matrix<T> out = unwritten(subject, n);
    Context context(threads);
    subject.start();
    for (Index first = 0, piece = 0; first < n; ++piece) {
      const Index wanted = pieces[static_cast<std::size_t>(piece) % pieces.size()];
      const Index count = std::min(wanted, n - first);
      extend(subject, sample, first, count, out, context);
      first += count;
    }
    return out;
  }

  /// With NaN in the rows of masked keys, unless a masked token reads them itself.
  template <class T>
  static Sample<T> poisoned_sample(const Heads& heads, Index n, std::uint64_t seed) {
    auto sample = random_sample<T>(heads, n, seed);
    sample.key_mask = Random(seed + 1000).mask(n, 0.3);
    if (!GetParam().masked_token_reads_itself) poison_masked_keys(sample);
    return sample;
  }
};

INSTANTIATE_TEST_SUITE_P(All, Streams, ::testing::ValuesIn(subject_cases()), subject_name);

TEST_P(Streams, AreAsForwardHoweverTheTokensArrive) {
  in_each_scalar([]<class T>(T) {
    const auto subject = make<T>();
    for (const Index n : {1, 5, 150}) {
      for (const bool masked : {false, true}) {
        auto sample = poisoned_sample<T>(grouped_heads(), n, 1000);
        if (!masked) sample = random_sample<T>(grouped_heads(), n, 1000);
        const Matrix<T> expected = run_forward(*subject, sample);
        for (const std::vector<Index>& pieces : {std::vector<Index>{1},
                                                 {n},
                                                 {3},
                                                 {0, 64, 1},
                                                 {1, 2, 3, 0, 33},
                                                 {7, 8},
                                                 {101, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}}) {
          EXPECT_TRUE(close(stream(*subject, sample, pieces), expected, tolerance<T>()))
              << "n = " << n << ", pieces of " << ::testing::PrintToString(pieces) << ", masked " << masked;
        }
      }
    }
  });
}

TEST_P(Streams, OfManyTokensAreAsForward) {
  // Heads of whole vectors have ways of their own, and so have many queries at a time.
  const Heads heads{.query = 2, .key_value = 1, .dim = 16, .value_dim = any_shape() ? 32 : 0};
  const auto subject = make<float>(heads);
  const auto sample = poisoned_sample<float>(heads, 1500, 1002);
  const Matrix<float> expected = run_forward(*subject, sample);
  for (const std::vector<Index>& pieces :
       {std::vector<Index>{1}, {1500}, {700, 1, 799}, {1, 1000}, {32, 16, 64, 128, 256, 512}, {640}}) {
    EXPECT_TRUE(close(stream(*subject, sample, pieces), expected, tolerance<float>()))
        << "pieces of " << ::testing::PrintToString(pieces);
  }
}

TEST_P(Streams, MayBeginWithMaskedKeys) {
  const auto subject = make<double>();
  auto sample = masked_sample<double>(40, 1001);
  std::fill_n(sample.key_mask.begin(), 20, std::uint8_t{0});
  if (!GetParam().masked_token_reads_itself) poison_masked_keys(sample);
  EXPECT_TRUE(close(stream(*subject, sample, {1}), run_forward(*subject, sample), tolerance<double>()));
}

TEST_P(Streams, MayHaveAMaskForSomeTokensOnly) {
  const auto subject = make<double>();
  auto sample = masked_sample<double>(90, 1003);
  std::fill_n(sample.key_mask.begin(), 30, std::uint8_t{1});
  std::fill_n(sample.key_mask.begin() + 60, 30, std::uint8_t{1});
  const Matrix<double> expected = run_forward(*subject, sample);
  Matrix<double> out = unwritten(*subject, 90);
  Context context(1);
  auto seen = sample;
  subject->start();
  for (const Index first : {0, 30, 60}) {
    seen.key_mask = first == 30 ? sample.key_mask : std::vector<std::uint8_t>{};
    extend(*subject, seen, first, 30, out, context);
  }
  EXPECT_TRUE(close(out, expected, tolerance<double>()));
}

TEST_P(Streams, GoOnIndependentlyWhereTheyAreCopied) {
  constexpr Index n = 100, common = 53;
  const auto subject = make<double>();
  const auto one = random_sample<double>(grouped_heads(), n, 1004);
  auto other = random_sample<double>(grouped_heads(), n, 1005);
  for (const auto& [to, from] :
       {std::pair{&other.query, &one.query}, {&other.key, &one.key}, {&other.value, &one.value}}) {
    to->topRows(common) = from->topRows(common);
  }
  Matrix<double> out = unwritten(*subject, n);
  Context context(1);
  subject->start();
  extend(*subject, one, 0, common, out, context);
  const auto copy = subject->copy();
  Matrix<double> other_out = out;
  for (Index i = common; i < n; ++i) {
    extend(*subject, one, i, 1, out, context);
    extend(*copy, other, i, 1, other_out, context);
  }
  EXPECT_TRUE(close(out, run_forward(*subject, one), tolerance<double>()));
  EXPECT_TRUE(close(other_out, run_forward(*subject, other), tolerance<double>()));
}

TEST_P(Streams, DoNotDependOnTheNumberOfThreads) {
  const auto subject = make<float>();
  const auto sample = masked_sample<float>(200, 1006);
  for (const std::vector<Index>& pieces : {std::vector<Index>{1}, {90, 3}}) {
    EXPECT_TRUE(same_bits(stream(*subject, sample, pieces, 3), stream(*subject, sample, pieces, 1)));
  }
}

TEST_P(Streams, RefuseWhatIsNoSequenceBeforeAnythingIsWritten) {
  const auto subject = make<double>();
  const auto good = random_sample<double>(grouped_heads(), 20, 1007);
  Context context(1);
  Matrix<double> out = unwritten(*subject, 20);
  subject->start();
  const std::vector<Index> offsets{0, 3, 10};
  const auto packed = [&](Index first) {
    Inputs<double> inputs{good.query.middleRows(first, 10), good.key.middleRows(first, 10),
                          good.value.middleRows(first, 10)};
    inputs.query_offsets = offsets;
    return inputs;
  };
  extend(*subject, good, 0, 10, out, context);
  const Matrix<double> before = out;
  EXPECT_THROW(subject->extend(packed(10), out.middleRows(10, 10), context), std::invalid_argument);
  EXPECT_THROW(subject->extend({good.query.middleRows(10, 1), good.key, good.value}, out.middleRows(10, 1), context),
               std::invalid_argument);
  EXPECT_TRUE(same_bits(out, before));
  extend(*subject, good, 10, 10, out, context);
  EXPECT_TRUE(close(out, run_forward(*subject, good), tolerance<double>()));
}

}  // namespace
}  // namespace nearfar::test
