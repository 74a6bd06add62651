#pragma once

// The training loop: batches in pieces, evaluation, progress, log, checkpoints.

#include "checkpoint.hpp"
#include "log.hpp"
#include "model.hpp"
#include "optimizer.hpp"
#include "task.hpp"

#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace train {

/// Set by a signal: the run ends after the step it is at, and leaves a checkpoint.
inline volatile std::sig_atomic_t stop_requested = 0;

/// Lets SIGINT and SIGTERM ask the run to stop. A second one ends the program at once, an evaluation or not.
inline void stop_at_signals() {
  for (const int number : {SIGINT, SIGTERM}) {
    std::signal(number, [](int same) {
      stop_requested = 1;
      std::signal(same, SIG_DFL);
    });
  }
}

/// The sequences of a batch in pieces of at most `tokens` tokens each, or of one sequence that is longer.
inline std::vector<Batch> pieces_of(const Batch& batch, Index tokens, bool target_a_sequence) {
  std::vector<Batch> pieces;
  for (Index b = 0; b < batch.sequences(); ++b) {
    const auto begin = batch.offsets[static_cast<std::size_t>(b)], end = batch.offsets[static_cast<std::size_t>(b) + 1];
    if (pieces.empty() || pieces.back().offsets.back() + end - begin > tokens) pieces.emplace_back();
    Batch& piece = pieces.back();
    piece.tokens.insert(piece.tokens.end(), batch.tokens.begin() + begin, batch.tokens.begin() + end);
    const Index first = target_a_sequence ? b : begin, last = target_a_sequence ? b + 1 : end;
    piece.targets.insert(piece.targets.end(), batch.targets.begin() + first, batch.targets.begin() + last);
    piece.end_sequence();
  }
  return pieces;
}

template <nearfar::DifferentiableAttention Attention>
class Trainer {
 public:
  using T = typename Attention::Scalar;

  /// `run` says in words which run this is: a checkpoint of another one is refused.
  Trainer(const Task& task, const Setting& setting, const Attention& attention, std::string run, int threads)
      : task_(task),
        setting_(setting),
        run_(std::move(run)),
        context_(threads),
        model_(model_options(task, setting), attention, random_for(setting.seed, Purpose::weights)),
        adam_(variables_of(model_),
              {.rate = setting.rate, .warm_up = setting.warm_up, .steps = setting.steps, .clip = setting.clip}),
        grad_logits_(task.model().classes) {}

  Model<Attention>& model() { return model_; }
  Index step() const { return progress_.step; }

  /// One step of training. Returns the loss on the batch before the step.
  Loss train_step() {
    const Index step = progress_.step;
    const Batch batch = task_.training_batch(step);
    Random dropout = random_for(setting_.seed, Purpose::dropout, step);
    const auto targets = batch.targets.size() -
                         static_cast<std::size_t>(std::count(batch.targets.begin(), batch.targets.end(), no_target));
    Loss loss;
    for (const Batch& piece : pieces_of(batch, setting_.piece, task_.model().pool)) {
      const Tokens<const T> logits = model_.forward(piece, &dropout, context_);
      const Tokens<T> grad = grad_logits_.rows(logits.rows());
      loss += cross_entropy<T>(logits, piece.targets, T(1) / static_cast<T>(targets), grad);
      model_.backward(grad, context_);
    }
    const double norm = adam_.step(step);
    if (!std::isfinite(loss.cross_entropy) || !std::isfinite(norm)) {
      throw std::runtime_error("the loss or its gradient is not finite at step " + std::to_string(step) + ".");
    }
    progress_.step += 1;
    progress_.tokens += static_cast<Index>(batch.tokens.size());
    return loss;
  }

  Loss evaluate(Part part) {
    Loss loss;
    for (Index number = 0; number < task_.evaluation_batches(part); ++number) {
      const Batch batch = task_.evaluation_batch(part, number);
      for (const Batch& piece : pieces_of(batch, setting_.piece, task_.model().pool)) {
        const Tokens<const T> logits = model_.forward(piece, nullptr, context_);
        loss += cross_entropy<T>(logits, piece.targets, T(0), grad_logits_.rows(logits.rows()));
      }
    }
    return loss;
  }

  /// Trains to the end and tests, or stops where a signal asks to: then false. Leaves log.csv and checkpoint in
  /// `folder`.
  bool run(const std::filesystem::path& folder) {
    Log log(folder / "log.csv", progress_.step, setting_.steps, task_);
    while (progress_.step < setting_.steps) {
      const Stopwatch watch;
      progress_.since_row += train_step();
      watch.add_to(progress_);
      log.show_step(progress_);
      const bool last = progress_.step == setting_.steps;
      if (progress_.step % row_every == 0 || last) {
        log.row("training", progress_, progress_.since_row);
        progress_.since_row = {};
      }
      if (progress_.step % setting_.evaluate_every == 0 || last) {
        log.row("validation", progress_, evaluate(Part::validation));
      }
      if (progress_.step % save_every == 0 || last || stop_requested) save(folder / "checkpoint");
      if (stop_requested) return false;
    }
    log.row("test", progress_, evaluate(Part::test));
    return true;
  }

  void save(const std::filesystem::path& path) {
    Checkpoint checkpoint(run_);
    adam_.for_each([&](const std::string& name, std::span<T> numbers) { checkpoint.put<T>(name, numbers); });
    progress_.for_each(
        [&](const std::string& name, auto& number) { checkpoint.put(name, std::span(&std::as_const(number), 1)); });
    checkpoint.save(path);
  }

  void load(const std::filesystem::path& path) {
    const Checkpoint checkpoint = Checkpoint::load(path, run_);
    adam_.for_each([&](const std::string& name, std::span<T> numbers) { checkpoint.get(name, numbers); });
    progress_.for_each([&](const std::string& name, auto& number) { checkpoint.get(name, std::span(&number, 1)); });
  }

 private:
  static constexpr Index row_every = 50, save_every = 50;

  static ModelOptions model_options(const Task& task, const Setting& setting) {
    ModelOptions options = task.model();
    options.width = setting.width;
    options.layers = setting.layers;
    options.feed_forward = setting.feed_forward;
    options.dropout = setting.dropout;
    return options;
  }

  const Task& task_;
  Setting setting_;
  std::string run_;
  nearfar::Context context_;
  Model<Attention> model_;
  Adam<T> adam_;
  Buffer<T> grad_logits_;
  Progress progress_;
};

}  // namespace train
