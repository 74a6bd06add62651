#include "measure.hpp"

#include <nearfar/nearfar.hpp>
#include <nearfar/nystrom.hpp>

#include <memory>
#include <utility>

// nearfar's own rows: every mechanism forward, and backward.
namespace bench {
namespace {

using nearfar::Heads;
using nearfar::Inputs;
using nearfar::Tokens;
using nearfar::Window;

template <class A>
auto forward_of(std::shared_ptr<const A> attention) {
  return [=](const Inputs<typename A::Scalar>& inputs, Tokens<typename A::Scalar> out) {
    return [=](nearfar::Context& context) { attention->forward(inputs, out, context); };
  };
}

/// The first call goes forward before it goes backward, so that what is saved between the two counts as extra memory.
template <nearfar::DifferentiableAttention A>
auto backward_of(std::shared_ptr<const A> attention) {
  using T = typename A::Scalar;
  struct Pass {
    typename A::Saved saved;
    typename A::Parameters grad_parameters;
    bool is_saved = false;
  };
  return [=](const Inputs<T>& inputs, Tokens<T> out) {
    const auto pass = std::make_shared<Pass>(Pass{{}, attention->parameters(), false});
    Tensors<T>& data = tensors<T>(inputs.query.rows(), inputs.query.cols(), true);
    const auto rows = [&](nearfar::Matrix<T>& matrix) { return Tokens<T>(matrix).middle_rows(0, inputs.query.rows()); };
    const Tokens<const T> grad_out = rows(data.grad_out);
    const nearfar::InputGradients<T> grad{rows(data.grad_query), rows(data.grad_key), rows(data.grad_value)};
    return [=](nearfar::Context& context) {
      if (!pass->is_saved) attention->forward(inputs, out, pass->saved, context);
      pass->is_saved = true;
      attention->backward(inputs, out, pass->saved, grad_out, grad, pass->grad_parameters, context);
    };
  };
}

/// Adds a mechanism's rows: forward, and backward where it has that. `subject` says what is particular to it.
template <class A>
void add_attention(Suite& suite, A attention, Subject<typename A::Scalar> subject) {
  const auto shared = std::make_shared<const A>(std::move(attention));
  subject.heads = shared->heads();
  subject.family = "forward";
  subject.prepare = forward_of(shared);
  add(suite, subject);
  if constexpr (nearfar::DifferentiableAttention<A>) {
    if (subject.one_query) return;
    subject.family = "backward";
    subject.reach = {subject.reach.quick / 4, subject.reach.full / 4};
    subject.flops = [forward = subject.flops](Index n) { return 2.5 * forward(n); };
    subject.prepare = backward_of(shared);
    subject.tensors_moved = 8;  // query, key, value, out and its gradient are read, three gradients written
    subject.approximates_softmax = false;
    add(suite, subject);
  }
}

void add_softmax(Suite& suite, bool causal) {
  const auto flops = [causal](const Heads& heads) {
    return [=](Index n) { return flops_of_window(heads, full_window(causal), n); };
  };
  const nearfar::SoftmaxOptions options{.causal = causal};
  add_attention(suite, nearfar::Softmax<float>(standard_heads, options),
                {.mechanism = "softmax", .causal = causal, .reach = softmax_reach, .flops = flops(standard_heads)});

  const Heads wide{.query = 4, .key_value = 4, .dim = 128};
  add_attention(suite, nearfar::Softmax<float>(wide, options),
                {.mechanism = "softmax_d128", .causal = causal, .reach = {4096, 16384}, .flops = flops(wide)});
  add_attention(
      suite, nearfar::Softmax<double>(standard_heads, options),
      {.mechanism = "softmax_double", .causal = causal, .reach = {4096, 8192}, .flops = flops(standard_heads)});
  if (causal) {
    add_attention(suite, nearfar::Softmax<float>(standard_heads, options),
                  {.mechanism = "softmax_decode",
                   .causal = causal,
                   .reach = {65536, 65536},
                   .flops = [](Index n) { return flops_of_pairs(standard_heads, real(n)); },
                   .one_query = true});
  }
}

void add_banded(Suite& suite, const char* mechanism, Window window, bool causal) {
  add_attention(suite, nearfar::Banded<float>(standard_heads, {.window = window, .causal = causal}),
                {.mechanism = mechanism, .causal = causal, .reach = long_reach, .flops = [=](Index n) {
                   return flops_of_window(standard_heads, causal ? window.causal() : window, n);
                 }});
}

void add_linear(Suite& suite, bool causal) {
  add_attention(suite, nearfar::Linear<float>(standard_heads, {.causal = causal}),
                {.mechanism = "linear", .causal = causal, .reach = long_reach, .flops = [=](Index n) {
                   return flops_of_linear(standard_heads, n, 1, causal);
                 }});
}

void add_nystrom(Suite& suite) {
  constexpr Index landmarks = 64;
  add_attention(suite, nearfar::Nystrom<float>(standard_heads, {.landmarks = landmarks}),
                {.mechanism = "nystrom", .reach = {65536, 65536}, .flops = [=](Index n) {
                   return flops_of_nystrom(standard_heads, n, landmarks);
                 }});
}

/// The core takes query, key and value as they come; with the transform it is the published layer.
void add_additive(Suite& suite, const char* mechanism, bool causal, bool transform) {
  nearfar::Additive<float> attention(standard_heads, {.causal = causal, .transform = transform});
  fill(attention.parameters().w_q, standard_heads.query, standard_heads.query_cols(), 4);
  fill(attention.parameters().w_k, standard_heads.query, standard_heads.query_cols(), 5);
  add_attention(
      suite, std::move(attention),
      {.mechanism = mechanism,
       .causal = causal,
       .reach = long_reach,
       .flops = [=](Index n) { return flops_of_additive(standard_heads, n, transform); },
       .tensors_moved = causal ? 4.0 : 5.0,  // bidirectional, the query is read again once the means are known
       .approximates_softmax = false});
}

void add_multipole(Suite& suite, const char* mechanism, const nearfar::MultipoleOptions& options) {
  add_attention(suite, nearfar::Multipole<float>(standard_heads, options),
                {.mechanism = mechanism, .causal = options.causal, .reach = long_reach, .flops = [=](Index n) {
                   return flops_of_pairs(standard_heads, multipole_pairs(n, options.block, options.rank, options.causal,
                                                                         options.pooled_queries));
                 }});
}

}  // namespace

void add_forward_and_backward(Suite& suite) {
  for (const bool causal : {false, true}) {
    add_softmax(suite, causal);
    add_banded(suite, "banded", banded_window(causal), causal);
    add_banded(suite, "banded_30", {29, 29}, causal);  // the FMMformer paper's bands, |i - j| < 30 and < 5
    add_banded(suite, "banded_5", {4, 4}, causal);
    add_linear(suite, causal);
    if (!causal) add_nystrom(suite);
    add_additive(suite, "additive", causal, false);
    add_additive(suite, "additive_transform", causal, true);
    add_multipole(suite, "multipole", {.block = 64, .rank = 4, .causal = causal});
    if (!causal) add_multipole(suite, "multipole_pooled", {.block = 64, .rank = 4, .pooled_queries = true});
  }
}

}  // namespace bench
