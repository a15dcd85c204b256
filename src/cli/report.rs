//! What was done, in lines for standard error.

use std::fmt::Write as _;

use flapjack::engine::{
    CalibrationReport, Effect, Engine, Found, HealEnd, HealReport, LayerSnapshot, ModelReport,
    NoEffects, PlanSearchReport, ProfileFrom, PruneReport, SparseReport, SpeedComparison, Spread,
    Target, Turns, TypesReport, What,
};
use flapjack::generate::Generated;
use flapjack::hub;
use flapjack::prune::bits::TypeChanges;
use flapjack::prune::sparse::Allocate;

use super::words::{self, mebibytes, megabytes, millions, plural, seconds, target_words};

/// Everything that `run` says at the end.
pub struct Run {
    /// The model as it was opened.
    model: ModelReport,
    pub pruned: Option<PruneReport>,
    /// How fast the pruned model is beside the dense one; `None` where that was not measured.
    pub comparison: Option<SpeedComparison>,
    /// Whether the prompt was answered as a user's message, and not gone on with.
    pub answers: bool,
}

/// What calibration took.
pub fn calibration_lines(report: &CalibrationReport) -> Vec<String> {
    let how = match report.profile {
        ProfileFrom::File => "from a profile".to_owned(),
        ProfileFrom::Unread => "not again".to_owned(),
        ProfileFrom::NotNeeded => "layer by layer".to_owned(),
        ProfileFrom::Now if report.resumed > 0 => {
            format!("{} of them in a run that was broken off", report.resumed)
        }
        ProfileFrom::Now => format!(
            "{:.0} tokens/s",
            report.tokens as f64 / report.time.as_secs_f64().max(1e-9)
        ),
    };
    if report.profile == ProfileFrom::NotNeeded && report.tokens == 0 {
        // No text was looked at.
        return Vec::new();
    }
    let mut lines = vec![format!(
        "  calibrate  {}  {} of {}, {how}",
        seconds(report.time),
        plural(report.tokens, "token"),
        report.source
    )];
    lines.extend(report.curves.map(|curves| {
        format!(
            "  curves     {}  what each module is worth, on {} held back",
            seconds(curves.time),
            plural(curves.tokens, "token")
        )
    }));
    lines.extend(report.groups.map(|groups| {
        format!(
            "  memory     covariances in {} of layers, not all at once",
            plural(groups, "group")
        )
    }));
    lines
}

impl Run {
    pub fn new(engine: &Engine) -> Self {
        Self {
            model: engine.report(),
            pruned: None,
            comparison: None,
            answers: false,
        }
    }

    /// `reason` is why the answer ended.
    pub fn print(&self, generated: &Generated, reason: &str) {
        words::say(&format!("\n{}", self.text(generated, reason).trim_end()));
    }

    fn text(&self, generated: &Generated, reason: &str) -> String {
        let ModelReport { path, .. } = &self.model;
        let mut lines = vec![format!(
            "{}: {}, {} parameters, {}; {} with {}",
            hub::name_of_file(path),
            plural(self.model.layers, "layer"),
            millions(self.model.parameters),
            mebibytes(self.model.bytes as u64),
            self.model.isa,
            plural(self.model.threads, "thread"),
        )];
        let how = match self.answers {
            true => {
                "a user's message, by the model's chat template (--raw goes on with it instead)"
            }
            false => "gone on with as it stands",
        };
        lines.push(format!("  read as    {how}"));
        lines.push(format!("  map        {}", seconds(self.model.load_time)));
        if let Some(time) = self.model.pack_time {
            lines.push(format!("  pack       {}", seconds(time)));
        }
        if let Some(pruned) = &self.pruned {
            lines.extend(calibration_lines(&pruned.calibration));
            lines.extend(pruned_lines(pruned));
        }
        lines.extend(self.speed_lines(generated));
        lines.push(format!("  end        {reason}"));
        lines.into_iter().fold(String::new(), |mut text, line| {
            let _ = writeln!(text, "{line}");
            text
        })
    }

    fn speed_lines(&self, generated: &Generated) -> Vec<String> {
        let timings = &generated.timings;
        let mut lines = vec![
            speed_line(
                "prompt",
                &plural(timings.prompt_tokens, "token"),
                Some(timings.prompt_speed()),
            ),
            speed_line(
                "generate",
                &plural(generated.tokens.len(), "token"),
                timings.generation_speed(),
            ),
        ];
        lines.extend(self.comparison.iter().flat_map(comparison_lines));
        lines
    }
}

/// Something of a layer.
type Of<T> = fn(&LayerSnapshot) -> T;

/// Ratio, widths, sizes and memory, before and after.
pub fn pruned_lines(report: &PruneReport) -> Vec<String> {
    let PruneReport { before, after, .. } = report;
    let mut lines = match report.calibration.profile {
        ProfileFrom::NotNeeded => Vec::new(),
        _ => structured_lines(report),
    };
    lines.extend(report.types.as_ref().map(retyped_line));
    lines.extend(report.sparse.iter().flat_map(sparse_lines));
    lines.extend(report.heal.iter().flat_map(heal_lines));
    lines.push(change_line(
        "parameters",
        millions(before.parameters),
        millions(after.parameters),
        after.parameters as f64 / before.parameters as f64,
    ));
    lines.push(change_line(
        "weights",
        mebibytes(before.bytes as u64),
        mebibytes(after.bytes as u64),
        after.bytes as f64 / before.bytes as f64,
    ));
    lines.extend(
        report
            .effects
            .iter()
            .flat_map(|effect| effect_lines(report, effect)),
    );
    lines.extend(report.no_effects.map(no_effects_line));
    if let (Some(resident), Some(private), Some(resident_after), Some(private_after)) = (
        before.map_resident,
        before.map_private,
        after.map_resident,
        after.map_private,
    ) {
        lines.push(format!(
            "  map        resident {} -> {}, of it private {} -> {}",
            mebibytes(resident),
            mebibytes(resident_after),
            mebibytes(private),
            mebibytes(private_after)
        ));
    }
    if let (Some(was), Some(is)) = (before.process_resident, after.process_resident) {
        lines.push(change_line(
            "process",
            format!("resident {}", mebibytes(was)),
            mebibytes(is),
            is as f64 / was as f64,
        ));
    }
    lines
}

/// How heads and channels were removed, and what is left of them.
fn plan_search_line(search: &PlanSearchReport) -> String {
    format!(
        "  plans      {}  {} tried, {} better: divergence {:.3} -> {:.3} nats on {} tokens held back",
        seconds(search.time),
        search.tried,
        search.better,
        search.before,
        search.after,
        search.tokens
    )
}

fn structured_lines(report: &PruneReport) -> Vec<String> {
    let PruneReport {
        recipe,
        before,
        after,
        ..
    } = report;
    let mut lines = search_lines(report);
    lines.extend(report.plan_search.iter().map(plan_search_line));
    lines.push(format!(
        "  prune      {}  asked {:.1} %, removed {:.1} % of the layers' weights{}",
        seconds(report.time),
        report.ratio * 100.0,
        report.removed * 100.0,
        match report.repeated {
            true => ", as in an earlier run (from the cache)",
            false => "",
        }
    ));
    lines.push(format!(
        "  by         {}, {}, heads by {}, restoration {}",
        recipe.metric, recipe.structure, recipe.heads, recipe.restore
    ));
    let layers = || before.layers.iter().zip(&after.layers);
    let widths: [(&str, Of<usize>); 3] = [
        ("heads", |layer| layer.heads),
        ("KV heads", |layer| layer.kv_heads),
        ("channels", |layer| layer.channels),
    ];
    for (name, width) in widths {
        let kept = layers().map(|(was, is)| (width(was), width(is)));
        lines.push(kept_line(name, kept));
    }
    let types: [(&str, Of<&'static str>); 2] = [
        ("attention output", |layer| layer.output_type),
        ("MLP down", |layer| layer.down_type),
    ];
    for (name, of) in types {
        lines.extend(types_line(
            name,
            layers().map(|(was, is)| (of(was), of(is))),
        ));
    }
    lines
}

/// Single weights that are gone.
fn sparse_lines(report: &SparseReport) -> Vec<String> {
    let how = match report.allocate {
        Allocate::Even => "the same share of every module",
        Allocate::Curves => "shared out by loss curves",
    };
    let mut lines = vec![format!(
        "  sparse     {}  {}, {how}: {:.1} % of the layers' weights are {}",
        seconds(report.time),
        report.sparsity,
        100.0 * report.removed,
        words::sparse_words(report),
    )];
    if let Some(curves) = report.curves {
        let shares = |first: usize| {
            let shares = report.shares.iter().skip(first).step_by(2);
            let shares: Vec<String> = shares
                .map(|share| format!("{:.0}", 100.0 * share))
                .collect();
            shares.join(" ")
        };
        lines.push(format!(
            "  curves     {}  what each module is worth, on {} held back",
            seconds(curves.time),
            plural(curves.tokens, "token")
        ));
        lines.push(format!("  attention  by layer, in per cent: {}", shares(0)));
        lines.push(format!("  MLP        by layer, in per cent: {}", shares(1)));
    }
    lines
}

/// How the model was healed.
fn heal_lines(report: &HealReport) -> Vec<String> {
    let of = match report.what {
        What::All => "all weights of the layers",
        What::LowRank => "changes of low rank, norms and biases",
        What::Norms => "norms and biases",
    };
    let how = match (report.repeated, report.resumed) {
        (true, _) => ", in an earlier run (from the cache)".to_owned(),
        (false, 0) => {
            let seconds = report.time.as_secs_f64().max(1e-9);
            format!(", {:.0} tokens/s", report.tokens as f64 / seconds)
        }
        (false, resumed) => format!(
            "; {} were done in a run that was broken off",
            plural(resumed, "step")
        ),
    };
    let mut lines = vec![format!(
        "  heal       {}  {of} trained on {} in {}, rate {}{how}",
        seconds(report.time),
        plural(report.tokens, "token"),
        plural(report.steps, "step"),
        report.rate,
    )];
    let unhealed = "the model is as pruning left it";
    lines.push(match report.end {
        HealEnd::Healed | HealEnd::NotBetter => {
            let change = change_line(
                "divergence",
                format!("{:.4}", report.before),
                format!("{:.4}", report.after),
                report.after / report.before,
            );
            let unhealed = match report.end {
                HealEnd::NotBetter => format!("; no better, so that {unhealed}"),
                _ => String::new(),
            };
            let tokens = plural(report.held_back, "held-back token");
            format!("{change}  from the dense model on {tokens}{unhealed}")
        }
        HealEnd::Diverged => format!(
            "  not healed: step {} met what is not a number (a lower --heal-rate may do); {unhealed}",
            report.steps
        ),
        HealEnd::Cancelled => format!("  not healed: interrupted; {unhealed}"),
    });
    lines
}

fn change_line(name: &str, was: String, is: String, part: f64) -> String {
    format!(
        "  {name:<10} {was} -> {is}  ({:+.1} %)",
        (part - 1.0) * 100.0
    )
}

/// Which matrices were given smaller types.
fn retyped_line(report: &TypesReport) -> String {
    let TypeChanges {
        head,
        embedding,
        projections,
    } = &report.changes;
    let of_one = |name: &str, types: &Option<(&str, &str)>| {
        types.map(|(before, after)| format!("{name} from {before} to {after}"))
    };
    let of_many = projections.iter().map(|(before, after, count)| {
        format!("{} from {before} to {after}", plural(*count, "projection"))
    });
    let changes: Vec<String> = of_one("head", head)
        .into_iter()
        .chain(of_one("embedding", embedding))
        .chain(of_many)
        .collect();
    let what = match changes.is_empty() {
        true => "as they were".to_owned(),
        false => changes.join(", "),
    };
    let time = report.measuring + report.time;
    format!("  types      {}  {what}", seconds(time))
}

fn search_lines(report: &PruneReport) -> Vec<String> {
    let Some(search) = &report.search else {
        return Vec::new();
    };
    let words = found_words(report.target, report.ratio, &search.found);
    let mut lines = vec![format!("  find       {}  {words}", seconds(search.time))];
    lines.extend(
        search
            .speedup
            .map(|factor| format!("  reached    {factor:.2} times the speed, measured")),
    );
    lines
}

/// What a target came to.
pub fn found_words(target: Target, ratio: f64, found: &Found) -> String {
    let what = match *found {
        Found::Bytes { before, after } => format!(
            "leaves {} of weights of {}",
            megabytes(after as usize),
            megabytes(before as usize)
        ),
        Found::Speed {
            bytes_before,
            bytes_after,
            before,
            predicted,
        } => format!(
            "reads {} a token in place of {}; predicted {predicted:.1} tokens/s in place of {before:.1}",
            megabytes(bytes_after as usize),
            megabytes(bytes_before as usize)
        ),
        Found::Perplexity {
            tokens,
            dense,
            rise,
            beyond,
        } => {
            let beyond = beyond.map_or(String::new(), |(ratio, rise)| {
                let rise = rise * 100.0;
                format!("; ratio {ratio:.4} would raise it by {rise:.1} %")
            });
            format!(
                "raises the perplexity on {} of the calibration text from {dense:.2} by {:.1} %{beyond}",
                plural(tokens, "held-back token"),
                rise * 100.0
            )
        }
    };
    format!("{}: ratio {ratio:.4} {what}", target_words(target))
}

/// What pruning does to predictions on one text.
fn effect_lines(report: &PruneReport, effect: &Effect) -> [String; 2] {
    let line = change_line(
        "perplexity",
        format!("{:.2}", effect.before),
        format!("{:.2}", effect.after),
        effect.rise(),
    );
    let text = words::effect_text(effect.text, &report.calibration.source);
    [
        format!("{line}  on {} of {text}", plural(effect.tokens, "token")),
        format!(
            "  predicts   the same token as most likely at {:.1} % of the positions; divergence {:.3} nats",
            100.0 * effect.agreement,
            effect.divergence
        ),
    ]
}

fn no_effects_line(reason: NoEffects) -> String {
    let why = match reason {
        NoEffects::NoText => "the model has no tokenizer, and so no text",
        NoEffects::Cancelled => "interrupted",
    };
    format!("  perplexity not measured: {why}")
}

/// Layer by layer what is left of what, in runs of equal numbers: "9 of 9 ×3, 7, 8 ×2".
fn kept_line(name: &str, layers: impl Iterator<Item = (usize, usize)>) -> String {
    let (before, after): (Vec<usize>, Vec<usize>) = layers.unzip();
    let (was, is): (usize, usize) = (before.iter().sum(), after.iter().sum());
    let runs: Vec<String> = after
        .chunk_by(|a, b| a == b)
        .map(|run| match run.len() {
            1 => run[0].to_string(),
            n => format!("{}×{n}", run[0]),
        })
        .collect();
    format!("  {name:<10} {is} of {was}, by layer: {}", runs.join(" "))
}

/// In how many layers a tensor has changed from which type to which, if it has in any.
fn types_line<'a>(name: &str, layers: impl Iterator<Item = (&'a str, &'a str)>) -> Option<String> {
    let mut changes: Vec<((&str, &str), usize)> = Vec::new();
    for change in layers.filter(|(was, is)| was != is) {
        match changes.iter_mut().find(|(other, _)| *other == change) {
            Some((_, count)) => *count += 1,
            None => changes.push((change, 1)),
        }
    }
    let changes: Vec<String> = changes
        .into_iter()
        .map(|((was, is), count)| format!("{was} -> {is} ×{count}"))
        .collect();
    (!changes.is_empty()).then(|| format!("  types      {name} {}", changes.join(", ")))
}

/// `None` where nothing was generated behind the first token.
fn speed_line(name: &str, amount: &str, speed: Option<f64>) -> String {
    let speed = speed.map_or(String::new(), |speed| format!(", {speed:.1} tokens/s"));
    format!("  {name:<10} {amount}{speed}")
}

/// The pruned model beside the dense one, in turns.
fn comparison_lines(comparison: &SpeedComparison) -> Vec<String> {
    let SpeedComparison {
        prompt_tokens,
        generated,
        prompt,
        generation,
    } = comparison;
    let line = |name: &str, tokens: usize, turns: &Turns| {
        format!(
            "  {name:<10} {}: dense {}, pruned {} tokens/s; {} times as fast",
            plural(tokens, "token"),
            spread_words(turns.dense(), 1),
            spread_words(turns.pruned(), 1),
            spread_words(turns.ratio(), 2),
        )
    };
    let mut lines = vec![
        format!(
            "  in turns   {} each; medians (least to most)",
            plural(prompt.dense.len(), "turn")
        ),
        line("  prompt", *prompt_tokens, prompt),
        line("  generate", *generated, generation),
    ];
    if prompt.ratio().is_wide() || generation.ratio().is_wide() {
        lines.push("  busy       the turns differ widely: other work on this machine disturbs them, and these figures say little".to_owned());
    }
    lines
}

/// "20.1 (19.8 to 20.4)".
fn spread_words(spread: Spread, digits: usize) -> String {
    let Spread {
        median,
        least,
        most,
    } = spread;
    format!("{median:.digits$} ({least:.digits$} to {most:.digits$})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_widths_are_told_in_runs() {
        let line = kept_line("heads", [(9, 9), (9, 9), (9, 7), (9, 8)].into_iter());
        assert_eq!(line, "  heads      33 of 36, by layer: 9×2 7 8");
    }

    #[test]
    fn changes_of_type_are_counted() {
        let line = |was: &[&'static str], is: &[&'static str]| {
            let layers = was.iter().copied().zip(is.iter().copied());
            types_line("MLP down", layers)
        };
        assert_eq!(line(&["Q4_K"; 3], &["Q4_K"; 3]), None);
        let line = line(
            &["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K"],
            &["Q8_0", "Q4_1", "Q4_K", "Q6_K", "Q4_1"],
        );
        let expected = "  types      MLP down Q6_K -> Q8_0 ×1, Q4_K -> Q4_1 ×2";
        assert_eq!(line.as_deref(), Some(expected));
    }

    #[test]
    fn speeds_are_told() {
        assert_eq!(
            speed_line("generate", "3 tokens", Some(30.0)),
            "  generate   3 tokens, 30.0 tokens/s"
        );
        assert_eq!(
            speed_line("generate", "1 token", None),
            "  generate   1 token"
        );
    }

    #[test]
    fn a_comparison_is_told_as_medians_with_their_spread() {
        let turns = |dense: [f64; 3], pruned: [f64; 3]| Turns {
            dense: dense.to_vec(),
            pruned: pruned.to_vec(),
        };
        let mut comparison = SpeedComparison {
            prompt_tokens: 7,
            generated: 32,
            prompt: turns([100.0, 104.0, 102.0], [150.0, 156.0, 153.0]),
            generation: turns([20.0, 21.0, 20.0], [24.0, 25.2, 26.0]),
        };
        assert_eq!(
            comparison_lines(&comparison),
            [
                "  in turns   3 turns each; medians (least to most)",
                "    prompt   7 tokens: dense 102.0 (100.0 to 104.0), pruned 153.0 (150.0 to 156.0) tokens/s; 1.50 (1.50 to 1.50) times as fast",
                "    generate 32 tokens: dense 20.0 (20.0 to 21.0), pruned 25.2 (24.0 to 26.0) tokens/s; 1.20 (1.20 to 1.30) times as fast",
            ]
        );
        // A compiler ran beside one of the turns.
        comparison.generation.pruned[1] = 6.0;
        let lines = comparison_lines(&comparison);
        assert!(lines[3].contains("differ widely"), "{lines:?}");
    }
}
