#include <nearfar/any_attention.hpp>

#include "support/compare.hpp"
#include "support/sample.hpp"

#include <gtest/gtest.h>

#include <locale>
#include <string>
#include <vector>

namespace {

using namespace nearfar;
using nearfar::test::random_sample;
using nearfar::test::run_backward;
using nearfar::test::run_forward;
using nearfar::test::same_bits;

static_assert(DifferentiableAttention<AnyAttention<float>> && StreamingAttention<AnyAttention<float>>);
static_assert(DifferentiableAttention<AnyAttention<double>> && StreamingAttention<AnyAttention<double>>);

constexpr Heads heads{.query = 2, .key_value = 2, .dim = 4};

std::string line_of(std::string_view line) { return AnyAttention<float>(heads, line).line(); }

/// The sentence with which a line is refused.
std::string error_of(std::string_view line) {
  try {
    AnyAttention<float> attention(heads, line);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

/// The options that a line gives to a mechanism.
template <template <class> class Mechanism, class Options = typename Mechanism<float>::Options>
Options options_of(std::string_view line) {
  Options found;
  AnyAttention<float>(heads, line).visit([&](const auto& mechanism) {
    if constexpr (requires { found = mechanism.options(); }) found = mechanism.options();
  });
  return found;
}

/// A line for each mechanism that sets every option, but for one that excludes another, to what is not its default.
const std::vector<std::string> full_lines = {
    "softmax:causal,scale=0.25",
    "banded:left=3,right=5,causal,scale=0.25",
    "linear:maps=tanh+elu_flip,causal,normalizer=sqrt_length,eps=0.001,normalize_features",
    "nystrom:landmarks=3,scale=0.25,tolerance=1e-9",
    "fmm:left=3,right=5,maps=tanh+relu,causal,scale=0.25,normalizer=sqrt_length,eps=0.001,normalize_features,"
    "gate=identity,weights=shared",
    "additive:causal,scale=0.25,per_head_weights,bias=off,transform=off,add_query=off",
    "multipole:block=8,rank=2,mass_scaling=off,pooling=hierarchical_convolution,pooled_queries,query_pooling=all,"
    "scale=0.25,levels=3",
};

TEST(AnyAttention, IsTheMechanismThatTheLineNames) {
  for (const std::string& line : full_lines) {
    const AnyAttention<float> attention(heads, line);
    EXPECT_EQ(attention.name(), line.substr(0, line.find(':')));
    EXPECT_EQ(attention.heads(), heads);
  }
}

TEST(AnyAttention, ReadsEveryOption) {
  const auto softmax = options_of<Softmax>(full_lines[0]);
  EXPECT_TRUE(softmax.causal);
  EXPECT_EQ(softmax.scale, 0.25);

  const auto banded = options_of<Banded>(full_lines[1]);
  EXPECT_EQ(banded.window, (Window{3, 5}));
  EXPECT_TRUE(banded.causal);
  EXPECT_EQ(banded.scale, 0.25);

  const auto linear = options_of<Linear>(full_lines[2]);
  ASSERT_EQ(linear.feature_maps.size(), 2u);
  EXPECT_EQ(linear.feature_maps[0].name(), "tanh");
  EXPECT_EQ(linear.feature_maps[1].name(), "elu_flip");
  EXPECT_TRUE(linear.causal);
  EXPECT_EQ(linear.normalizer, Normalizer::sqrt_length);
  EXPECT_EQ(linear.eps, 0.001);
  EXPECT_TRUE(linear.normalize_features);

  const auto nystrom = options_of<Nystrom>(full_lines[3]);
  EXPECT_EQ(nystrom.landmarks, 3);
  EXPECT_EQ(nystrom.scale, 0.25);
  EXPECT_EQ(nystrom.tolerance, 1e-9);
  EXPECT_EQ(options_of<Nystrom>("nystrom:iterations=6").iterations, 6);

  const auto fmm = options_of<Fmm>(full_lines[4]);
  EXPECT_EQ(fmm.window, (Window{3, 5}));
  ASSERT_EQ(fmm.feature_maps.size(), 2u);
  EXPECT_EQ(fmm.feature_maps[0].name(), "tanh");
  EXPECT_EQ(fmm.feature_maps[1].name(), "relu");
  EXPECT_TRUE(fmm.causal);
  EXPECT_EQ(fmm.scale, 0.25);
  EXPECT_EQ(fmm.normalizer, Normalizer::sqrt_length);
  EXPECT_EQ(fmm.eps, 0.001);
  EXPECT_TRUE(fmm.normalize_features);
  EXPECT_EQ(fmm.gate, Gate::identity);
  EXPECT_EQ(fmm.weights, BlendWeights::shared);
  EXPECT_EQ(options_of<Fmm>("fmm:weights=per_head").weights, BlendWeights::per_head);

  const auto additive = options_of<Additive>(full_lines[5]);
  EXPECT_TRUE(additive.causal);
  EXPECT_EQ(additive.scale, 0.25);
  EXPECT_TRUE(additive.per_head_weights);
  EXPECT_FALSE(additive.bias);
  EXPECT_FALSE(additive.transform);
  EXPECT_FALSE(additive.add_query);

  const auto multipole = options_of<Multipole>(full_lines[6]);
  EXPECT_EQ(multipole.block, 8);
  EXPECT_EQ(multipole.rank, 2);
  EXPECT_FALSE(multipole.causal);
  EXPECT_FALSE(multipole.mass_scaling);
  EXPECT_EQ(multipole.pooling, Pooling::hierarchical_convolution);
  EXPECT_TRUE(multipole.pooled_queries);
  EXPECT_EQ(multipole.query_pooling, QueryPooling::all);
  EXPECT_EQ(multipole.scale, 0.25);
  EXPECT_EQ(multipole.levels, 3);
  EXPECT_TRUE(options_of<Multipole>("multipole:causal").causal);
}

TEST(AnyAttention, LeavesTheOtherOptionsAtTheirDefaults) {
  const auto multipole = options_of<Multipole>("multipole:rank=8");
  EXPECT_EQ(multipole.block, MultipoleOptions{}.block);
  EXPECT_EQ(multipole.mass_scaling, MultipoleOptions{}.mass_scaling);
  EXPECT_EQ(multipole.scale, std::nullopt);
  EXPECT_EQ(options_of<Banded>("banded").window, Window{});
}

TEST(AnyAttention, GivesWhatTheMechanismGives) {
  const auto sample = random_sample<double>(heads, 37, 1);
  const auto run = [&](std::string_view line) { return run_forward(AnyAttention<double>(heads, line), sample); };
  EXPECT_TRUE(same_bits(run("softmax:causal"), run_forward(Softmax<double>(heads, {.causal = true}), sample)));
  EXPECT_TRUE(same_bits(run("banded:left=2,right=1"), run_forward(Banded<double>(heads, {.window = {2, 1}}), sample)));
  EXPECT_TRUE(same_bits(run("linear:maps=tanh"),
                        run_forward(Linear<double>(heads, {.feature_maps = {feature_map::Tanh{}}}), sample)));
  EXPECT_TRUE(same_bits(run("nystrom:landmarks=5"), run_forward(Nystrom<double>(heads, {.landmarks = 5}), sample)));
  EXPECT_TRUE(same_bits(run("fmm:left=4,right=4"), run_forward(Fmm<double>(heads, {.window = {4, 4}}), sample)));
  EXPECT_TRUE(same_bits(run("additive:causal"), run_forward(Additive<double>(heads, {.causal = true}), sample)));
  EXPECT_TRUE(same_bits(run("multipole:block=4,rank=2"),
                        run_forward(Multipole<double>(heads, {.block = 4, .rank = 2}), sample)));
}

TEST(AnyAttention, PrintsALineInShortestFormAsItWas) {
  for (const std::string& line : full_lines) EXPECT_EQ(line_of(line), line);
  for (const std::string line :
       {"softmax", "multipole:block=64,rank=4,causal", "multipole:causal,rank=4", "additive:transform,bias=off",
        "linear:maps=elu+tanh,normalizer=sqrt_length", "linear:eps=1e-6", "linear:eps=0", "softmax:scale=0.1",
        "softmax:scale=1e30", "softmax:scale=0.12345678901234566", "banded:left=0,right=0"}) {
    EXPECT_EQ(line_of(line), line);
  }
}

TEST(AnyAttention, PrintsEveryValueInShortestForm) {
  EXPECT_EQ(line_of(" banded : left = 4,right=04 ,\tcausal=on , scale=0.50\r\n"),
            "banded:left=4,right=4,causal,scale=0.5");
  EXPECT_EQ(line_of("linear:eps=0.000001"), "linear:eps=1e-6");
  EXPECT_EQ(line_of("softmax:causal=off,scale=2.0e+00"), "softmax:causal=off,scale=2");
  EXPECT_EQ(line_of("softmax:scale=2e1"), "softmax:scale=20");
  EXPECT_EQ(line_of("linear:eps=1e+30"), "linear:eps=1e30");
  EXPECT_EQ(line_of("linear:maps = elu + tanh"), "linear:maps=elu+tanh");
}

TEST(AnyAttention, DescribesAMechanismByWhatDiffersFromTheDefaults) {
  EXPECT_EQ(AnyAttention<float>(Softmax<float>(heads)).line(), "softmax");
  EXPECT_EQ(AnyAttention<float>(Banded<float>(heads, {.window = {2, 7}})).line(), "banded:left=2,right=7");
  for (const std::string& line : full_lines) {
    const AnyAttention<float> described =
        AnyAttention<float>(heads, line).visit([](const auto& mechanism) { return AnyAttention<float>(mechanism); });
    EXPECT_EQ(described.line(), line);
  }
}

TEST(AnyAttention, ReadsAndPrintsNumbersAlikeInEveryLocale) {
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Comma));
  const std::string line = line_of("banded:left=12345,scale=0.5");
  std::locale::global(before);
  EXPECT_EQ(line, "banded:left=12345,scale=0.5");
}

TEST(AnyAttention, NamesAnUnknownMechanismAndListsTheKnown) {
  const std::string known = "; known are softmax, banded, linear, nystrom, fmm, additive, multipole.";
  EXPECT_EQ(error_of("sofmax"), "nearfar::AnyAttention: unknown mechanism \"sofmax\"" + known);
  EXPECT_EQ(error_of("Softmax:causal"), "nearfar::AnyAttention: unknown mechanism \"Softmax\"" + known);
  EXPECT_EQ(error_of(""), "nearfar::AnyAttention: unknown mechanism \"\"" + known);
  EXPECT_EQ(error_of("softmax causal"), "nearfar::AnyAttention: unknown mechanism \"softmax causal\"" + known);
}

TEST(AnyAttention, NamesAnUnknownOptionAndListsTheKnown) {
  EXPECT_EQ(error_of("multipole:blok=64"),
            "nearfar::AnyAttention: unknown option \"blok\" of multipole; known are block, rank, causal, mass_scaling, "
            "pooling, pooled_queries, query_pooling, scale, levels.");
  for (const std::string line : {"softmax:", "softmax:causal,", "softmax:,causal", "softmax:=1"}) {
    EXPECT_EQ(error_of(line), "nearfar::AnyAttention: unknown option \"\" of softmax; known are causal, scale.");
  }
}

TEST(AnyAttention, RefusesAnOptionThatIsGivenTwice) {
  EXPECT_EQ(error_of("banded:left=1,right=2,left=1"), "nearfar::AnyAttention: option left of banded is given twice.");
}

TEST(AnyAttention, RefusesAValueThatIsNone) {
  const auto must = [](const std::string& option_of_mechanism, const std::string& what) {
    return "nearfar::AnyAttention: option " + option_of_mechanism + " must be " + what + ".";
  };
  for (const std::string text : {"", "x", "64x", "6 4", "6.4", "+64", "0x40", "99999999999999999999", "64=64"}) {
    EXPECT_EQ(error_of("multipole:block=" + text),
              must("block of multipole", "a whole number, but is \"" + text + "\""));
  }
  EXPECT_EQ(error_of("multipole:block"), must("block of multipole", "a whole number, but has no value"));
  for (const std::string text : {"", "x", "0.5x", "1e999", "inf", "nan", "0.5 0.5"}) {
    EXPECT_EQ(error_of("softmax:scale=" + text), must("scale of softmax", "a number or none, but is \"" + text + "\""));
  }
  EXPECT_EQ(error_of("softmax:scale"), must("scale of softmax", "a number or none, but has no value"));
  EXPECT_EQ(error_of("softmax:causal=yes"), must("causal of softmax", "on or off, but is \"yes\""));
  EXPECT_EQ(error_of("softmax:causal="), must("causal of softmax", "on or off, but is \"\""));
  EXPECT_EQ(error_of("linear:normalizer=rows"),
            must("normalizer of linear", "one of row_sum, sqrt_length, but is \"rows\""));
}

TEST(AnyAttention, NamesAnUnknownFeatureMapAndListsTheKnown) {
  const std::string known =
      " must be feature maps joined by + (elu, elu_flip, tanh, relu, sigmoid, softplus, identity), but ";
  for (const std::string mechanism : {"linear", "fmm"}) {
    const std::string option = "nearfar::AnyAttention: option maps of " + mechanism + known;
    EXPECT_EQ(error_of(mechanism + ":maps=elu+cosine"), option + "is \"elu+cosine\".");
    EXPECT_EQ(error_of(mechanism + ":maps=elu+"), option + "is \"elu+\".");
    EXPECT_EQ(error_of(mechanism + ":maps"), option + "has no value.");
  }
}

TEST(AnyAttention, LeavesWhatDoesNotFitTogetherToTheMechanism) {
  EXPECT_EQ(error_of("multipole:rank=3"), "nearfar::Multipole: rank must divide block, but 3 does not divide 64.");
  EXPECT_EQ(error_of("nystrom:tolerance=1.0000001"),
            "nearfar::Nystrom: tolerance must be 0 or more and less than 1, but is 1.0000001.");
  EXPECT_EQ(error_of("softmax:scale=-1e-9"), "nearfar::Softmax: scale must be positive and finite, but is -1e-09.");
}

TEST(AnyAttention, RefusesAScaleThatIsZeroOrInfiniteInItsScalar) {
  for (const std::string name : {"softmax", "banded", "nystrom", "fmm", "additive", "multipole"}) {
    for (const std::string scale : {"1e+300", "3.5e+38", "1e-60"}) {
      const std::string line = name + ":scale=" + scale;
      const std::string end = ": scale must be positive and finite as a float, but is " + scale + ".";
      EXPECT_TRUE(error_of(line).ends_with(end)) << error_of(line);
      EXPECT_NO_THROW(AnyAttention<double>(heads, line)) << line;
    }
    EXPECT_EQ(error_of(name + ":scale=1e38"), "no error");
    EXPECT_EQ(error_of(name + ":scale=1e-38"), "no error");
  }
}

TEST(AnyAttention, RefusesHeadsWhoseColumnsCannotBeCounted) {
  constexpr Index large = Index{1} << 40;
  EXPECT_THROW(AnyAttention<float>({.query = large, .dim = large}, "softmax"), std::invalid_argument);
  EXPECT_THROW(AnyAttention<float>({.query = large, .dim = 1, .value_dim = large}, "softmax"), std::invalid_argument);
  try {
    AnyAttention<float>({.query = large, .key_value = 1, .dim = large}, "linear");
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(
        error.what(),
        "nearfar::Linear: heads.dim and heads.value_dim must be at most 8388607 for 1099511627776 query heads, "
        "but the larger is 1099511627776.");
  }
  EXPECT_NO_THROW(AnyAttention<float>({.query = large, .key_value = large, .dim = 4}, "softmax"));
}

/// Draws every matrix anew.
template <class Parameters>
void draw(Parameters&& parameters, std::uint64_t seed) {
  nearfar::test::Random random(seed);
  parameters.for_each(
      [&](const auto&, Matrix<double>& matrix) { matrix = random.matrix<double>(matrix.rows(), matrix.cols()); });
}

std::vector<Matrix<double>> all_of(AnyAttention<double>::Parameters parameters) {
  std::vector<Matrix<double>> matrices;
  parameters.for_each([&](const auto&, Matrix<double>& matrix) { matrices.push_back(matrix); });
  return matrices;
}

TEST(AnyAttention, TrainsAsEachMechanismDoes) {
  const auto sample = random_sample<double>(heads, 21, 2);
  const Matrix<double> grad_out = random_sample<double>(heads, 21, 3).query;
  for (const std::string line :
       {"softmax:causal", "banded:left=2,right=1", "linear:maps=elu+tanh", "nystrom:landmarks=4", "fmm:left=2,right=2",
        "additive:per_head_weights", "multipole:block=4,rank=2,pooling=grouped_convolution,levels=3"}) {
    AnyAttention<double> any(heads, line);
    draw(any.parameters(), 4);
    const auto actual = run_backward(any, sample, grad_out);
    any.visit([&](const auto& mechanism) {
      auto expected = run_backward(mechanism, sample, grad_out);
      EXPECT_TRUE(same_bits(actual.out, expected.out)) << line;
      EXPECT_TRUE(same_bits(actual.query, expected.query)) << line;
      EXPECT_TRUE(same_bits(actual.key, expected.key)) << line;
      EXPECT_TRUE(same_bits(actual.value, expected.value)) << line;
      const std::vector<Matrix<double>> gradients = all_of(actual.parameters);
      auto next = gradients.begin();
      expected.parameters.for_each([&](const auto& name, Matrix<double>& gradient) {
        ASSERT_NE(next, gradients.end());
        EXPECT_TRUE(same_bits(*next++, gradient)) << line << ' ' << name;
      });
      EXPECT_EQ(next, gradients.end());
    });
  }
}

TEST(AnyAttention, RunsWithTheParametersThatStandInIt) {
  const auto sample = random_sample<double>(heads, 9, 2);
  AnyAttention<double> any(heads, "additive");
  Additive<double> direct(heads);
  EXPECT_TRUE(same_bits(run_forward(any, sample), run_forward(direct, sample)));
  draw(any.parameters(), 5);
  EXPECT_FALSE(same_bits(run_forward(any, sample), run_forward(direct, sample)));
  draw(direct.parameters(), 5);
  EXPECT_TRUE(same_bits(run_forward(any, sample), run_forward(direct, sample)));
}

TEST(AnyAttention, CopiesItsParametersFromWhereTheyStand) {
  AnyAttention<double> any(heads, "additive");
  draw(any.parameters(), 1);
  const auto before = any.parameters();
  const std::vector<Matrix<double>> copied = all_of(before);
  const auto copy = zeros_like(any.parameters());
  EXPECT_EQ(copied.size(), 6u);
  std::size_t zeros = 0;
  copy.for_each([&](const auto&, const Matrix<double>& matrix) { zeros += matrix.isZero(0); });
  EXPECT_EQ(zeros, copied.size());
  EXPECT_EQ(copied, all_of(any.parameters()));
}

TEST(AnyAttention, RefusesWhatAnotherMechanismSaved) {
  const auto sample = random_sample<double>(heads, 5, 2);
  Matrix<double> out = sample.query, query = sample.query, key = sample.key, value = sample.value;
  const AnyAttention<double> linear(heads, "linear"), additive(heads, "additive");
  AnyAttention<double>::Saved saved_by_linear, saved_by_additive;
  linear.forward(sample.inputs(), out, saved_by_linear);
  additive.forward(sample.inputs(), out, saved_by_additive);
  const auto error_of_backward = [&](const AnyAttention<double>::Saved& saved,
                                     AnyAttention<double>::Parameters parameters) -> std::string {
    try {
      additive.backward(sample.inputs(), out, saved, out, {query, key, value}, parameters);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(error_of_backward(saved_by_additive, additive.parameters()), "no error");
  EXPECT_EQ(error_of_backward({}, additive.parameters()),
            "nearfar::AnyAttention: saved must come from additive, but is empty.");
  EXPECT_EQ(error_of_backward(saved_by_linear, additive.parameters()),
            "nearfar::AnyAttention: saved must come from additive, but comes from linear.");
  EXPECT_EQ(error_of_backward(saved_by_additive, linear.parameters()),
            "nearfar::AnyAttention: grad_parameters must come from additive, but comes from linear.");
}

TEST(AnyAttention, RefusesItsOwnParametersAsTheirGradients) {
  const auto sample = random_sample<double>(heads, 5, 2);
  Matrix<double> out = sample.query, query = sample.query, key = sample.key, value = sample.value;
  for (const std::string line : {"additive", "fmm", "multipole:block=2,rank=1,pooling=grouped_convolution,levels=3"}) {
    AnyAttention<double> any(heads, line);
    AnyAttention<double>::Saved saved;
    any.forward(sample.inputs(), out, saved);
    std::string error;
    try {
      any.backward(sample.inputs(), out, saved, out, {query, key, value}, any.parameters());
    } catch (const std::invalid_argument& refused) {
      error = refused.what();
    }
    EXPECT_TRUE(error.ends_with(": grad_parameters are the parameters themselves: pass a copy of them, set to zero."))
        << line << ": " << error;
  }
}

TEST(AnyAttention, KeepsWhatAnotherMechanismSavedWhereItRefusesTheInputs) {
  const auto sample = random_sample<double>(heads, 5, 2);
  Matrix<double> out = sample.query, query = sample.query, key = sample.key, value = sample.value;
  const AnyAttention<double> linear(heads, "linear"), softmax(heads, "softmax");
  AnyAttention<double>::Saved saved;
  softmax.forward(sample.inputs(), out, saved);
  Matrix<double> short_out(4, heads.out_cols());
  EXPECT_THROW(linear.forward(sample.inputs(), short_out, saved), std::invalid_argument);
  auto gradients = softmax.parameters();
  EXPECT_NO_THROW(softmax.backward(sample.inputs(), out, saved, out, {query, key, value}, gradients));
}

TEST(AnyAttention, RefusesARoomBelowZeroWhicheverMechanismItHolds) {
  for (const std::string line : {"softmax:causal", "linear:causal"}) {
    EXPECT_THROW(AnyAttention<float>(heads, line).start(-1), std::invalid_argument) << line;
  }
}

TEST(AnyAttention, StreamsAsTheMechanismDoes) {
  const auto sample = random_sample<double>(heads, 12, 6);
  for (const std::string line : {"softmax:causal", "banded:left=3,causal", "linear:causal", "fmm:left=3,causal",
                                 "additive:causal", "multipole:block=2,rank=1,causal"}) {
    const AnyAttention<double> any(heads, line);
    const Matrix<double> whole = run_forward(any, sample);
    Matrix<double> out(12, heads.out_cols());
    AnyAttention<double>::State state = any.start();
    for (const auto& [first, count] : {std::pair<Index, Index>{0, 5}, {5, 1}, {6, 6}}) {
      any.extend(state,
                 {sample.query.middleRows(first, count), sample.key.middleRows(first, count),
                  sample.value.middleRows(first, count)},
                 out.middleRows(first, count));
    }
    EXPECT_TRUE(nearfar::test::close(out, whole, 1e-13)) << line;
    EXPECT_EQ(state.tokens, 12) << line;
    any.visit([&]<class M>(const M&) {
      if constexpr (StreamingAttention<M>) {
        EXPECT_EQ(std::get<nearfar::detail::StateOf<M>>(state.of).state.tokens, 12) << line;
      }
    });
  }
}

TEST(AnyAttention, RewindsWhatItsMechanismCan) {
  const auto sample = random_sample<double>(heads, 12, 6);
  Matrix<double> out(12, heads.out_cols());
  const AnyAttention<double> softmax(heads, "softmax:causal"), fmm(heads, "fmm:causal");
  AnyAttention<double>::State state = softmax.start(), other = fmm.start();
  softmax.extend(state, sample.inputs(), out);
  const Matrix<double> row = out.row(7);
  softmax.rewind(state, 7);
  EXPECT_EQ(state.tokens, 7);
  softmax.extend(state, {sample.query.middleRows(7, 1), sample.key.middleRows(7, 1), sample.value.middleRows(7, 1)},
                 out.middleRows(0, 1));
  EXPECT_TRUE(nearfar::test::close(out.topRows(1), row, 1e-13));
  fmm.extend(other, sample.inputs(), out);
  try {
    fmm.rewind(other, 7);
    FAIL() << "no error";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(),
                 "nearfar::AnyAttention: fmm cannot be rewound, to 7 of 12 tokens: keep a copy of the state.");
  }
}

TEST(AnyAttention, RefusesStreamsOfWhatCannotStreamOrOfAnotherMechanism) {
  const AnyAttention<double> nystrom(heads, "nystrom"), linear(heads, "linear:causal"),
      additive(heads, "additive:causal");
  const auto error_of_call = [](auto&& call) -> std::string {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_EQ(error_of_call([&] { nystrom.start(); }), "nearfar::AnyAttention: nystrom cannot be streamed.");
  EXPECT_EQ(error_of_call([&] {
              auto state = additive.start();
              linear.extend(state, {}, {});
            }),
            "nearfar::AnyAttention: state must come from linear, but comes from additive.");
  AnyAttention<double>::State empty;
  EXPECT_EQ(error_of_call([&] { linear.extend(empty, {}, {}); }),
            "nearfar::AnyAttention: state must come from linear, but is empty.");
  EXPECT_EQ(error_of_call([&] { nystrom.extend(empty, {}, {}); }),
            "nearfar::AnyAttention: nystrom cannot be streamed.");
}

// A mechanism of the user's own, with one option.

struct ConstantOptions {
  std::optional<double> value = 1;  // 0 where it is not set
};

template <class T>
class Constant {
 public:
  using Scalar = T;
  using Options = ConstantOptions;

  explicit Constant(const Heads& its_heads, const Options& options = {}) : heads_(its_heads), options_(options) {}

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  void forward(const Inputs<T>& inputs, Tokens<T> out) const {
    check_inputs<T>("Constant", heads_, inputs, out, Lengths::any);
    out.matrix().setConstant(static_cast<T>(options_.value.value_or(0)));
  }

 private:
  Heads heads_;
  Options options_;
};

}  // namespace

template <>
struct nearfar::LineFormat<ConstantOptions> {
  static constexpr std::string_view name = "constant";
  static constexpr auto options() { return std::array{nearfar::line_option<&ConstantOptions::value>("value")}; }
};

namespace {

TEST(AnyAttention, TakesAMechanismOfTheUsersOwn) {
  using Any = AnyAttention<double, Constant<double>>;
  static_assert(Attention<Any> && !DifferentiableAttention<Any>);
  const Any attention(heads, "constant:value=2.5");
  EXPECT_EQ(attention.line(), "constant:value=2.5");
  const auto sample = random_sample<double>(heads, 3, 1);
  EXPECT_TRUE(same_bits(run_forward(attention, sample), Matrix<double>(Matrix<double>::Constant(3, 8, 2.5))));
  EXPECT_EQ(Any(heads, "softmax").name(), "softmax");
  auto short_mask = sample;
  short_mask.key_mask = {1, 1};
  EXPECT_THROW(run_forward(attention, short_mask), std::invalid_argument);
  const Any unset(Constant<double>(heads, {.value = std::nullopt}));
  EXPECT_EQ(unset.line(), "constant:value=none");
  EXPECT_TRUE(same_bits(run_forward(Any(heads, unset.line()), sample), run_forward(unset, sample)));
  EXPECT_THROW(Any(heads, "constant:valu=1"), std::invalid_argument);
}

// One that trains and streams and takes no context: out is value times a learned number.

enum class Sign { plus, minus };

struct ScaledValueOptions {
  Sign sign = Sign::plus;
};

template <class T>
class ScaledValue {
 public:
  using Scalar = T;
  using Options = ScaledValueOptions;
  struct Parameters {
    Matrix<T> factor;
    template <class Visit>
    void for_each(Visit&& visit) {
      visit("factor", factor);
    }
  };
  struct Saved {
    Matrix<T> value;
  };
  struct State {
    Index tokens = 0;
  };

  explicit ScaledValue(const Heads& its_heads, const Options& options = {})
      : heads_(its_heads),
        options_(options),
        parameters_{Matrix<T>::Constant(1, 1, options.sign == Sign::minus ? -1 : 1)} {}

  const Heads& heads() const { return heads_; }
  const Options& options() const { return options_; }
  const Parameters& parameters() const { return parameters_; }
  Parameters& parameters() { return parameters_; }

  void forward(const Inputs<T>& inputs, Tokens<T> out) const { out.matrix() = factor() * inputs.value.matrix(); }
  void forward(const Inputs<T>& inputs, Tokens<T> out, Saved& saved) const {
    forward(inputs, out);
    saved.value = inputs.value.matrix();
  }
  void backward(const Inputs<T>&, Tokens<const T>, const Saved& saved, Tokens<const T> grad_out,
                const InputGradients<T>& grad, Parameters& grad_parameters) const {
    grad.query.matrix().setZero();
    grad.key.matrix().setZero();
    grad.value.matrix() = factor() * grad_out.matrix();
    grad_parameters.factor(0, 0) += saved.value.cwiseProduct(grad_out.matrix()).sum();
  }
  State start() const { return {}; }
  void extend(State& state, const Inputs<T>& inputs, Tokens<T> out) const {
    state.tokens += inputs.value.rows();
    forward(inputs, out);
  }

 private:
  T factor() const { return parameters_.factor(0, 0); }

  Heads heads_;
  Options options_;
  Parameters parameters_;
};

}  // namespace

template <>
inline constexpr std::array<std::string_view, 2> nearfar::enumerator_names<Sign>{"plus", "minus"};

template <>
struct nearfar::LineFormat<ScaledValueOptions> {
  static constexpr std::string_view name = "scaled_value";
  static constexpr auto options() { return std::array{nearfar::line_option<&ScaledValueOptions::sign>("sign")}; }
};

namespace {

TEST(AnyAttention, TrainsAndStreamsAMechanismWithoutAContext) {
  using Any = AnyAttentionOf<Softmax<double>, ScaledValue<double>>;
  static_assert(DifferentiableAttention<Any> && StreamingAttention<Any>);
  const auto sample = random_sample<double>(heads, 3, 1);
  const Matrix<double> grad_out = random_sample<double>(heads, 3, 2).query;
  const Matrix<double> expected = -sample.value;
  const Any attention(heads, "scaled_value:sign=minus");
  EXPECT_EQ(attention.heads(), heads);
  EXPECT_EQ(attention.line(), "scaled_value:sign=minus");
  EXPECT_TRUE(same_bits(run_forward(attention, sample), expected));

  auto gradients = run_backward(attention, sample, grad_out);
  EXPECT_TRUE(same_bits(gradients.out, expected));
  EXPECT_TRUE(same_bits(gradients.value, Matrix<double>(-grad_out)));
  gradients.parameters.for_each([&](const auto&, const Matrix<double>& factor) {
    EXPECT_DOUBLE_EQ(factor(0, 0), sample.value.cwiseProduct(grad_out).sum());
  });

  Matrix<double> out(3, heads.out_cols());
  Any::State state = attention.start();
  attention.extend(state, sample.inputs(), out);
  attention.extend(state, sample.inputs(), out);
  EXPECT_TRUE(same_bits(out, expected));
  EXPECT_EQ(std::get<2>(state.of).state.tokens, 6);
}

TEST(StreamingAttention, StartsWithRoomWhereItTakesSome) {
  const Index tokens = 100;
  EXPECT_GE(start(Softmax<double>(heads, {.causal = true}), tokens).room(), tokens);
  EXPECT_EQ(start(Linear<double>(heads, {.causal = true}), tokens).sums.size(),
            Linear<double>(heads, {.causal = true}).start().sums.size());
  EXPECT_EQ(start(ScaledValue<double>(heads, {}), tokens).tokens, 0);
}

}  // namespace
