//! Files in other types: converting and quantising, what the inputs of matrices matter, and the types that make a file of a size.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Engine;
use super::bits::{Bits, Types};
use super::collection::TextAlone;
use super::error::{Doing, EngineError, OutOfReach};
use super::events::{Events, Stage};
use super::options::{Cache, CalibrationOptions, HeadType, OpenOptions};
use super::report::CalibrationReport;
use super::runtime;
use crate::convert::{self, Conversion, ConvertError, ImportanceMatrix, Source};
use crate::model::{MatrixId, Model};
use crate::prune::bits::{Importance, Joint, Moves, TypePlan, importance};
use crate::prune::{Calibration, Effort, calibrate};

/// How to convert a model.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    pub types: convert::Types,
    /// How much the inputs of matrices matter; `None` where all matter alike.
    pub importance: Option<ImportanceMatrix>,
    /// Threads, and metadata that take the place of the model's own; the rest is of no effect.
    pub open: OpenOptions,
}

/// A model as a GGUF file, written or to be.
#[derive(Debug, Clone)]
pub struct ConvertReport {
    /// The file or folder that it is made from.
    pub source: PathBuf,
    pub source_bytes: u64,
    pub bytes: u64,
    /// The type of the file, in the names of llama.cpp; `None` where it has none, or says what it said before.
    pub file_type: Option<&'static str>,
    pub tensors: Vec<TensorReport>,
    /// The file does not say how text is split into words, since the source's way has no name, and llama.cpp will guess.
    pub lacks_pre_tokenizer: bool,
    pub time: Duration,
}

/// A tensor, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorReport {
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    pub from: &'static str,
    pub to: &'static str,
    pub bytes_before: usize,
    pub bytes: usize,
}

/// Writes a model's file or folder as a GGUF file in other types; without a `target` it is only told what would be written. Weights go
/// through memory some rows at a time.
///
/// # Errors
/// If the source is no model that runs, it cannot have the types, the target is the source or cannot be written, or `events` cancels.
/// What was at the target before is then still there.
pub fn convert(
    source: impl AsRef<Path>,
    options: &ConvertOptions,
    target: Option<&Path>,
    events: &mut Events,
) -> Result<ConvertReport, EngineError> {
    let start = Instant::now();
    let source = Source::open(source, &options.open.overrides)?;
    let conversion = Conversion::new(&source, &options.types, options.importance.as_ref())?;
    let bytes = conversion.bytes()?;
    if let Some(target) = target {
        let runtime = runtime(&options.open)?;
        let doing = Doing::Export {
            path: target.to_owned(),
        };
        let progress = &mut Stage::Exporting.progress(events);
        conversion
            .write(&runtime, target, progress)
            .map_err(EngineError::from)
            .map_err(EngineError::at(doing))?;
    }
    let tensors = conversion.changes().map(|change| TensorReport {
        name: change.name.to_owned(),
        shape: change.shape.to_vec(),
        from: change.from,
        to: change.to,
        bytes_before: change.bytes.0,
        bytes: change.bytes.1,
    });
    Ok(ConvertReport {
        tensors: tensors.collect(),
        source: source.path().to_owned(),
        source_bytes: source.bytes(),
        bytes,
        file_type: conversion.file_type().map(|file_type| file_type.name()),
        lacks_pre_tokenizer: source.lacks_pre_tokenizer(),
        time: start.elapsed(),
    })
}

/// Reads an importance matrix in either of llama.cpp's forms.
///
/// # Errors
/// If it cannot be read, or is none.
pub fn read_importance(path: impl AsRef<Path>) -> Result<ImportanceMatrix, EngineError> {
    Ok(ImportanceMatrix::read(path)?)
}

/// Types that make a file of a size, and what they were found by.
#[derive(Debug, Clone)]
pub struct FittingTypes {
    pub types: convert::Types,
    pub importance: ImportanceMatrix,
    /// What they should cost, in nats per token, if losses add up.
    pub predicted: f64,
}

impl Engine {
    /// How much the inputs of the model's matrices matter on a text: their mean squares.
    ///
    /// # Errors
    /// If the text is of no use, activations are not numbers, or `events` cancels.
    pub fn importance_matrix(
        &self,
        calibration: &CalibrationOptions,
        effort: Effort,
        events: &mut Events,
    ) -> Result<(ImportanceMatrix, CalibrationReport), EngineError> {
        let start = Instant::now();
        self.must_be_dense()?;
        let mut alone = self.text_alone(calibration, effort)?;
        alone.write(self, 0, events)?;
        let text = alone.text();
        let doing = Doing::Calibrating {
            text: text.name().to_owned(),
        };
        let seen = Calibration {
            tokens: text.tokens(),
            bos: text.bos(),
            covariance: false,
        };
        let progress = &mut Stage::Importance.progress(events);
        let found = importance(&self.model, &self.runtime, seen, progress)
            .map_err(EngineError::from)
            .map_err(EngineError::at(doing))?;
        let tokens = text.tokens().len();
        let matrix = named(&self.model, &found, text.name(), tokens);
        let mut report = alone.report(tokens);
        report.time = start.elapsed();
        Ok((matrix, report))
    }

    /// The types of matrices that cost least where a file of the model may have so many bytes, measured on a text. Matrices that are in
    /// block types already get smaller ones only if they may be encoded once more.
    ///
    /// # Errors
    /// If the text is of no use, no types make the file as small, a matrix is in a block type and may not take another, or `events`
    /// cancels.
    pub fn types_within(
        &self,
        bytes: u64,
        requantize: bool,
        calibration: &CalibrationOptions,
        effort: Effort,
        events: &mut Events,
    ) -> Result<FittingTypes, EngineError> {
        self.must_be_dense()?;
        self.must_have_file()?;
        let source = Source::open(self.model.path(), &self.options.overrides)?;
        let as_it_is = Conversion::new(&source, &convert::Types::Keep, None)?;
        // All of the file but the weights, and what may be between tensors when these have other sizes.
        let padding = 64 * as_it_is.changes().count() as u64;
        let rest = as_it_is.bytes()?.saturating_sub(self.model.bytes() as u64) + padding;
        let is_float = |id| self.model.matrix(id).block_type.is_float();
        if !requantize && let Some(id) = matrices(&self.model).find(|id| !is_float(*id)) {
            let weight = self.model.matrix(id);
            return Err(ConvertError::Requantized {
                tensor: weight.name.clone(),
                from: weight.block_type.name(),
            }
            .into());
        }
        let mut alone = self.text_alone(calibration, effort)?;
        alone.write(self, 0, events)?;
        let text = alone.text();
        let bits = Bits {
            moves: Moves::Bits,
            head: HeadType::Keep,
        };
        let (tokens, bos) = (text.tokens(), text.bos());
        let measured = Types::measure(self, bits, tokens, bos, text.name(), events)?;
        let curves = measured.curves.as_ref().expect("bits are measured");
        let joint = Joint::new(&self.model, None, curves, TypePlan::none(&self.model));
        let found = joint.smallest(|plan| plan.bytes as u64 + rest <= bytes)?;
        let Some(found) = found else {
            let least = joint.least()?.bytes + rest as usize;
            return Err(OutOfReach::Bytes { bytes, least }.into());
        };
        let mut types = BTreeMap::new();
        for id in matrices(&self.model) {
            let weight = self.model.matrix(id);
            let new = found.types.type_of(&self.model, id);
            types.insert(weight.name.clone(), new);
        }
        Ok(FittingTypes {
            types: convert::Types::Each(types),
            importance: named(&self.model, &curves.importance, text.name(), tokens.len()),
            predicted: curves.loss(&found.types),
        })
    }

    fn text_alone(
        &self,
        calibration: &CalibrationOptions,
        effort: Effort,
    ) -> Result<TextAlone, EngineError> {
        let cached = self.usable_cache(Cache::All).has_profiles();
        TextAlone::read(self, calibration, effort, cached)
    }
}

/// All matrices of a model.
fn matrices(model: &Model) -> impl Iterator<Item = MatrixId> {
    let head = model.head_id();
    let own_head = (head != MatrixId::Embedding).then_some(head);
    let projections = (0..model.layers.len())
        .flat_map(|layer| (0..7).map(move |projection| MatrixId::Projection { layer, projection }));
    [MatrixId::Embedding]
        .into_iter()
        .chain(own_head)
        .chain(projections)
}

/// The importance of the inputs of matrices, by their names.
fn named(model: &Model, found: &Importance, text: &str, tokens: usize) -> ImportanceMatrix {
    let chunk = calibrate::SEQUENCE.min(model.config.context_length);
    let mut matrix = ImportanceMatrix::new(text, tokens.div_ceil(chunk.max(1)), chunk);
    for (layer, inputs) in model.layers.iter().zip(&found.layers) {
        for (linear, place) in layer.linears().into_iter().zip([0, 0, 0, 1, 2, 2, 3]) {
            matrix.insert(&linear.weight.name, &inputs[place], tokens as u64);
        }
    }
    let head = model.matrix(model.head_id());
    matrix.insert(&head.name, &found.head, tokens as u64);
    matrix
}
