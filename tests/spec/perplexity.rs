//! Perplexity, by hand on a small model and against llama.cpp on the real one.

use std::ops::ControlFlow;

use crate::common::Random;
use crate::common::synthetic::{Shape, Synthetic, logits, runtime};
use flapjack::eval::{PerplexityError, PerplexityOptions, perplexity};
use flapjack::gguf::GgufFile;
use flapjack::model::{CacheType, Model};
use flapjack::progress::ignore;
use flapjack::tokenize::Tokenizer;

fn options(context: usize, chunks: Option<usize>, all_positions: bool) -> PerplexityOptions {
    PerplexityOptions {
        context,
        chunks,
        all_positions,
        cache_type: CacheType::F16,
    }
}

/// The protocol once more, from the logits of each chunk.
fn by_hand(
    model: &Model,
    tokens: &[u32],
    bos: Option<u32>,
    options: PerplexityOptions,
) -> (f64, f64, usize) {
    let (context, vocabulary) = (options.context, model.config.vocabulary);
    let mut losses = Vec::new();
    for chunk in tokens
        .chunks_exact(context)
        .take(options.chunks.unwrap_or(usize::MAX))
    {
        let mut input = chunk.to_vec();
        if let Some(bos) = bos {
            input[0] = bos;
        }
        let logits = logits(model, &runtime(1), &input);
        let first = if options.all_positions {
            0
        } else {
            context / 2
        };
        for i in first..context - 1 {
            let row = &logits[i * vocabulary..][..vocabulary];
            let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
            losses.push(sum.ln() - f64::from(row[chunk[i + 1] as usize]));
        }
    }
    let n = losses.len() as f64;
    let mean = losses.iter().sum::<f64>() / n;
    let variance = losses.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / n;
    (
        mean.exp(),
        mean.exp() * (variance / (n - 1.0)).sqrt(),
        losses.len(),
    )
}

#[test]
fn the_second_half_of_every_chunk_counts_or_every_position_but_the_first() {
    let model = Synthetic::new(Shape::default()).load();
    let tokens = Random::new(4).tokens(333, 50);
    for bos in [None, Some(3)] {
        for options in [
            options(32, None, false),
            options(32, None, true),
            options(31, Some(3), false),
            options(200, None, true),
            options(4, Some(1000), false),
        ] {
            let result =
                perplexity(&model, &runtime(2), &tokens, bos, options, &mut ignore).unwrap();
            let (expected, stderr, count) = by_hand(&model, &tokens, bos, options);
            assert!(
                (result.perplexity / expected - 1.0).abs() < 1e-4,
                "{result:?} for {expected}"
            );
            assert!(
                (result.stderr / stderr - 1.0).abs() < 1e-3,
                "{result:?} for {stderr}"
            );
            assert_eq!(result.tokens, count);
            assert_eq!(
                result.chunks,
                (333 / options.context).min(options.chunks.unwrap_or(1000))
            );
        }
    }
}

#[test]
fn progress_tells_every_chunk() {
    let model = Synthetic::new(Shape::default()).load();
    let tokens = Random::new(4).tokens(100, 50);
    let mut seen = Vec::new();
    let options = options(20, None, false);
    perplexity(
        &model,
        &runtime(1),
        &tokens,
        None,
        options,
        &mut |done, total| {
            seen.push((done, total));
            ControlFlow::Continue(())
        },
    )
    .unwrap();
    assert_eq!(seen, [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]);

    let mut calls = 0;
    let cancelled = perplexity(&model, &runtime(1), &tokens, None, options, &mut |_, _| {
        calls += 1;
        match calls {
            3 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    });
    assert_eq!(calls, 3);
    let Err(PerplexityError::Stopped(so_far)) = cancelled else {
        panic!("{cancelled:?}");
    };
    let three = PerplexityOptions {
        chunks: Some(3),
        ..options
    };
    let three = perplexity(&model, &runtime(1), &tokens, None, three, &mut ignore).unwrap();
    assert_eq!(so_far, three, "what the chunks before came to");
}

#[test]
fn too_little_text_and_damaged_weights_are_errors() {
    let synthetic = Synthetic::new(Shape::default());
    let mut model = synthetic.load();
    let tokens = Random::new(4).tokens(100, 50);
    let run = |model: &Model, context| {
        perplexity(
            model,
            &runtime(1),
            &tokens,
            None,
            options(context, None, false),
            &mut ignore,
        )
    };
    assert!(matches!(
        run(&model, 101),
        Err(PerplexityError::TooShort {
            tokens: 100,
            context: 101
        })
    ));
    assert!(matches!(run(&model, 3), Err(PerplexityError::Context(3))));
    let range = model.layers[0].down.weight.range.clone();
    model.map.bytes_mut()[range][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    assert!(matches!(
        run(&model, 50),
        Err(PerplexityError::NotANumber { chunk: 0 })
    ));
}

/// Figures of `../shared/reference/perplexity.md`: 16 chunks of 512 of WikiText-2.
#[test]
fn the_default_model_is_within_one_percent_of_llama_cpp() {
    const LLAMA_CPP: f64 = 28.905;
    let Some(text) = crate::common::shared("data/wikitext-2/dev.raw") else {
        return;
    };
    let file = GgufFile::open(crate::common::default_model()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    let mut model = Model::load(file).unwrap();
    let runtime = runtime(2);
    model.pack(&runtime);
    let text = std::fs::read_to_string(text).unwrap();
    let tokens = tokenizer.encode_prompt(&text).unwrap();
    let options = options(512, Some(16), false);
    let result = perplexity(&model, &runtime, &tokens, None, options, &mut ignore).unwrap();
    let difference = result.perplexity / LLAMA_CPP - 1.0;
    assert!(
        difference.abs() < 0.01,
        "{} is {:.2} % off",
        result.perplexity,
        difference * 100.0
    );
    assert_eq!((result.tokens, result.chunks), (16 * 255, 16));
}
