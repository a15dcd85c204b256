//! Progress bars: on standard error, and only where that is a terminal.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use flapjack::engine::{self, Event, Stage};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar of `total` units; it draws nothing if standard error is not a terminal, and goes away when it is dropped.
pub fn bar(title: &'static str, total: u64, unit: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!(
        "{{msg:>12}} [{{bar:40}}] {{pos}}/{{len}} {unit} {{eta}}"
    ))
    .unwrap_or_else(|_| ProgressStyle::default_bar())
    .progress_chars("=> ");
    ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        .with_style(style)
        .with_message(title)
}

/// Draws a bar for each stage of what the engine does, one after the other.
pub fn bars() -> impl FnMut(Event) -> ControlFlow<()> + Send {
    let mut drawn: Option<(Stage, ProgressBar)> = None;
    move |Event { stage, done, total }| {
        if !drawn.as_ref().is_some_and(|(other, _)| *other == stage) {
            let (title, unit) = title(stage);
            drawn = Some((stage, bar(title, total, unit)));
        }
        if let Some((_, bar)) = &drawn {
            bar.set_length(total);
            bar.set_position(done);
        }
        if done == total {
            drawn = None;
        }
        ControlFlow::Continue(())
    }
}

/// What is done in a stage, and what is counted.
fn title(stage: Stage) -> (&'static str, &'static str) {
    match stage {
        Stage::Downloading => ("downloading", "bytes"),
        Stage::Unpacking => ("unpacking", "bytes"),
        Stage::Checking => ("checking", "bytes"),
        Stage::Writing => ("writing", "tokens"),
        Stage::Calibrating => ("calibrating", "tokens"),
        Stage::Covariances => ("covariances", "tokens"),
        Stage::Curves => ("measuring loss curves", "modules"),
        Stage::Searching => ("looking for the ratio", "models"),
        Stage::Pruning => ("pruning", "layers"),
        Stage::Effects => ("measuring", "chunks"),
        Stage::Scoring => ("scoring", "chunks"),
    }
}

/// The default model, fetched if it is not there yet.
pub fn default_model() -> Result<PathBuf> {
    let spinner = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let path = engine::default_model(&mut |event| {
        match event.stage {
            Stage::Downloading => {
                tracing::info!("downloading the default model (93 MB)");
                spinner.set_message("downloading the default model (93 MB)");
                spinner.enable_steady_tick(Duration::from_millis(100));
            }
            Stage::Unpacking => spinner.set_message(format!(
                "unpacking the default model: {} %",
                event.done * 100 / event.total.max(1)
            )),
            _ => spinner.set_message("checking the default model"),
        }
        ControlFlow::Continue(())
    })?;
    spinner.finish_and_clear();
    Ok(path)
}
