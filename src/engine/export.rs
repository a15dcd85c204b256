//! Writing the model to a file, with the record of how it was pruned.

use std::io::Write;
use std::path::Path;

use super::Engine;
use super::error::{Doing, EngineError};
use super::events::{Events, Stage, ignore};
use super::report::{ExportReport, ProfileFrom, PruneReport, SparseReport};
use crate::count::count;
use crate::files::TemporaryFile;
use crate::gguf::{GgufError, GgufFile};
use crate::model::{Export, LayerForm};
use crate::prune::{HealEnd, Record, record};

impl Engine {
    /// Writes the model to a GGUF file with the record of how it was pruned. llama.cpp runs it too, unless the report says that the form is
    /// flapjack's own.
    ///
    /// # Errors
    /// If the model was made in memory, its pruning was broken off, its file has changed since, or the system cannot write.
    pub fn export(&mut self, path: impl AsRef<Path>) -> Result<ExportReport, EngineError> {
        self.export_with(path, &mut ignore)
    }

    /// [`Engine::export`], with events.
    ///
    /// # Errors
    /// Those of [`Engine::export`]; if `events` cancels. What was at `path` before is then still there.
    pub fn export_with(
        &mut self,
        path: impl AsRef<Path>,
        events: &mut Events,
    ) -> Result<ExportReport, EngineError> {
        self.must_have_file()?;
        if self.touched && self.pruned.is_none() {
            return Err(EngineError::BrokenOff);
        }
        // A file holds weights as they are not packed.
        self.model.unpack(&self.runtime);
        let written = self.write_file(path.as_ref(), events);
        if self.pack_time.is_some() {
            self.model.pack(&self.runtime);
            self.settle();
        }
        written
    }

    fn write_file(&self, path: &Path, events: &mut Events) -> Result<ExportReport, EngineError> {
        // Another map of the same file: what was not pruned is taken from it as it is.
        let source = self.file()?;
        let export = Export::new(&self.model);
        let entries = self
            .record(&source, &export)?
            .map(|record| record.entries());
        let writer = export.writer(&source, record::PREFIX, entries.unwrap_or_default())?;
        let doing = Doing::Export {
            path: path.to_owned(),
        };
        let progress = &mut Stage::Exporting.progress(events);
        writer
            .save_with(path, progress)
            .map_err(|error| match error {
                GgufError::Cancelled(cancelled) => cancelled.into(),
                error => EngineError::from(error),
            })
            .map_err(EngineError::at(doing))?;
        let size = |path| std::fs::metadata(path).map_or(0, |file| file.len());
        let sum = |of: fn(&LayerForm) -> usize| export.layers().iter().map(of).sum();
        Ok(ExportReport {
            bytes: size(path),
            source_bytes: source.file_len() as u64,
            architecture: export.architecture().name(),
            own_form: export.is_own_form(),
            added_heads: sum(LayerForm::added_heads),
            repeated_kv_heads: sum(LayerForm::repeated_kv_heads),
            added_bytes: export.added_bytes(),
        })
    }

    /// How the model was pruned, now and before; `None` if it never was.
    fn record(&self, source: &GgufFile, export: &Export) -> Result<Option<Record>, EngineError> {
        let earlier = Record::from_gguf(source)?;
        let Some(report) = &self.pruned else {
            return Ok(earlier);
        };
        let calibration = &report.calibration;
        if source.fingerprint() != calibration.model {
            return Err(EngineError::FileChanged {
                path: source.path().to_owned(),
            });
        }
        let before = &report.before;
        let parameters = match &earlier {
            Some(record) => record.parameters,
            None => before.layer_parameters as u64,
        };
        let widths = before.layers.iter();
        let widths: Vec<_> = widths.map(|layer| (layer.heads, layer.channels)).collect();
        let layers = Record::layers(&report.plan, &widths, export.layers(), earlier.as_ref());
        let before = earlier.as_ref().and_then(|record| record.sparse.clone());
        let now = report
            .sparse
            .as_ref()
            .map(|sparse| sparse_in_words(sparse, &calibration.source));
        let sparse: Vec<String> = before.into_iter().chain(now).collect();
        let tokens = calibration.all_tokens;
        let record = match (calibration.profile, earlier) {
            // Heads and channels are as they were pruned before.
            (ProfileFrom::NotNeeded, Some(earlier)) => earlier,
            (ProfileFrom::NotNeeded, None) => Record {
                method: "none".to_owned(),
                calibration: "no text".to_owned(),
                ..self.record_of(report, parameters)
            },
            _ => Record {
                calibration: format!("{} of {}", count(tokens, "token"), calibration.source),
                ..self.record_of(report, parameters)
            },
        };
        Ok(Some(Record {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            model: calibration.model.clone(),
            sparse: (!sparse.is_empty()).then(|| sparse.join("; then ")),
            layers,
            ..record
        }))
    }

    /// How heads and channels were removed now, without what became of them.
    fn record_of(&self, report: &PruneReport, parameters: u64) -> Record {
        Record {
            version: String::new(),
            method: method_in_words(report),
            asked: report.ratio,
            ratio: 1.0 - self.model.layer_parameters() as f64 / parameters.max(1) as f64,
            parameters,
            profile: report.calibration.hash.clone(),
            calibration: String::new(),
            model: String::new(),
            sparse: None,
            layers: Vec::new(),
        }
    }

    /// [`Engine::write_image`] to a file for other programs to read, which goes when it is dropped.
    ///
    /// # Errors
    /// If the system's folder for temporary files cannot be written.
    ///
    /// # Panics
    /// If the weights are packed or pruned.
    pub fn image_file(&self) -> std::io::Result<TemporaryFile> {
        let mut file = TemporaryFile::new("synthetic.gguf")?;
        self.write_image(file.file())?;
        Ok(file)
    }

    /// Writes the file that a model in memory is the image of. Its weights must not be packed or pruned.
    ///
    /// # Errors
    /// Those of `out`.
    ///
    /// # Panics
    /// If the weights are packed or pruned.
    pub fn write_image(&self, out: &mut impl Write) -> std::io::Result<()> {
        let as_made = self.pack_time.is_none() && !self.touched;
        assert!(as_made, "an image has weights as they were made");
        out.write_all(self.model.map.bytes())
    }
}

/// Which single weights went, and by what.
fn sparse_in_words(report: &SparseReport, source: &str) -> String {
    let SparseReport {
        sparsity, allocate, ..
    } = report;
    let percent = 100.0 * report.removed;
    let text = match report.tokens {
        0 => String::new(),
        tokens => format!(", by {} of {source}", count(tokens, "token")),
    };
    format!("{sparsity} ({percent:.1} % of the layers' weights, shares {allocate}{text})")
}

/// Whether the model was healed, and by how much.
fn healed_in_words(report: &PruneReport) -> String {
    let healed = report.heal.filter(|heal| heal.end == HealEnd::Healed);
    healed.map_or(String::new(), |heal| {
        let tokens = count(heal.tokens, "token");
        format!(", healed ({} by {tokens}, rate {})", heal.what, heal.rate)
    })
}

/// The method, and the choices that it came to.
fn method_in_words(report: &PruneReport) -> String {
    let PruneReport { method, recipe, .. } = report;
    format!(
        "{method} ({}, {}, heads by {}, restoration {}){}",
        recipe.metric,
        recipe.structure,
        recipe.heads,
        recipe.restore,
        healed_in_words(report)
    )
}
