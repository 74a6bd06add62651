#include <nearfar/additive.hpp>
#include <nearfar/reference.hpp>

#include "subjects/subject.hpp"

namespace nearfar::test {
namespace {

/// Per-head weights as weights over all heads' features, zero outside the own head.
Matrix<double> over_all_heads(const Heads& heads, const Matrix<double>& weight) {
  if (weight.cols() == heads.query_cols()) return weight;
  Matrix<double> whole = Matrix<double>::Zero(heads.query, heads.query_cols());
  for (Index h = 0; h < heads.query; ++h) whole.row(h).segment(h * heads.dim, heads.dim) = weight.row(h);
  return whole;
}

Matrix<double> or_else(const Matrix<double>& given, const Matrix<double>& absent) {
  return given.size() > 0 ? given : absent;
}

Matrix<double> naive(const Additive<double>& attention, const Inputs<double>& inputs) {
  const Heads& heads = attention.heads();
  const auto& own = attention.parameters();
  const Matrix<double> no_bias = Matrix<double>::Zero(1, heads.query);
  const Index width = heads.query_cols();
  return reference::additive(
      heads, inputs,
      reference::AdditiveTerms<double>{.w_q = over_all_heads(heads, own.w_q),
                                       .b_q = or_else(own.b_q, no_bias),
                                       .w_k = over_all_heads(heads, own.w_k),
                                       .b_k = or_else(own.b_k, no_bias),
                                       .w_t = or_else(own.w_t, Matrix<double>::Identity(width, width)),
                                       .b_t = or_else(own.b_t, Matrix<double>::Zero(1, width)),
                                       .causal = attention.options().causal,
                                       .add_query = attention.options().add_query,
                                       .scale = attention.options().scale});
}

bool add(const std::string& name, const AdditiveOptions& options) {
  const SubjectCase known{.name = name, .causal = options.causal, .masked_token_reads_itself = true};
  return add_subject<Additive>(known, options, naive);
}

const bool added =
    add("additive", {}) && add("additive_causal", {.causal = true}) &&
    add("additive_per_head_causal", {.causal = true, .per_head_weights = true, .bias = false, .add_query = false}) &&
    add("additive_without_transform", {.per_head_weights = true, .transform = false});

}  // namespace
}  // namespace nearfar::test
