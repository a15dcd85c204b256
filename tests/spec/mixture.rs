//! The mixture that models are calibrated on by default, and what is told of the effect of pruning.

use std::fs;
use std::ops::ControlFlow;

use crate::common::engine::{Workshop, by, flap, source, tokens};
use crate::common::program::{stderr, stdout};
use crate::common::synthetic::{Shape, Synthetic, logits, runtime};
use crate::common::{Random, default_model};
use flapjack::chat::ChatTemplate;
use flapjack::engine::{
    Cache, CacheContent, CacheFolder, CacheKind, CalibrationOptions, EffectText, Engine, Event,
    MethodOptions, OpenOptions, PruneOptions, Stage, Target, TextSource, ignore,
};
use flapjack::eval::{self, PerplexityOptions, Predicted};
use flapjack::generate::{Answers, Texts};
use flapjack::model::CacheType;
use flapjack::progress;
use flapjack::prune::{Effort, Method, StoredProfile, calibrate, store};

/// Pruning that keeps profiles and texts, but is done anew each time.
fn profiles(options: PruneOptions) -> PruneOptions {
    PruneOptions {
        cache: Cache::Profiles,
        ..options
    }
}

/// The default method without loss curves, after few tokens of a source.
fn fast(source: TextSource, mix: Option<f64>) -> PruneOptions {
    PruneOptions {
        method: MethodOptions {
            effort: Effort::Fast,
            ..MethodOptions::default()
        },
        calibration: CalibrationOptions {
            source,
            mix,
            ..tokens(512)
        },
        ..PruneOptions::default()
    }
}

/// The texts in the cache of a workshop: what is calibrated on, and what is held back.
pub fn texts(workshop: &Workshop) -> Vec<[Vec<u32>; 2]> {
    let files = workshop.cached("text").into_iter();
    files
        .map(|path| {
            let bytes = fs::read(path).unwrap();
            let content = &bytes[8..bytes.len() - 32];
            let numbers: Vec<u32> = content
                .chunks_exact(4)
                .map(|n| u32::from_le_bytes(n.try_into().unwrap()))
                .collect();
            let (text, held_back) = numbers[2..].split_at(numbers[0] as usize);
            assert_eq!(held_back.len(), numbers[1] as usize);
            [text.to_vec(), held_back.to_vec()]
        })
        .collect()
}

// ---- the mixture ----

#[test]
fn the_default_text_is_the_mixture_and_the_same_for_any_number_of_threads() {
    let workshops = [Workshop::new(), Workshop::new()];
    let written = workshops.iter().zip([1, 2]).map(|(workshop, threads)| {
        let options = OpenOptions {
            threads: Some(threads),
            cache: Some(workshop.path("profiles")),
            ..OpenOptions::default()
        };
        let mut engine = Engine::open(&workshop.model, options).unwrap();
        let report = engine.prune(&flap_on(2048), &mut ignore).unwrap();
        assert_eq!(report.calibration.source, "the mixture");
        assert_eq!(report.calibration.all_tokens, 2048);
        texts(workshop)
    });
    let written: Vec<_> = written.collect();
    let [[text, held_back]] = &written[0][..] else {
        panic!("one text, and not {}", written[0].len());
    };
    assert_eq!(written[0], written[1]);
    assert_eq!((text.len(), held_back.len()), (2048, 1024));
    // This model has no chat template: what it writes, prose and code by turns.
    let decode = |tokens: &[u32]| {
        let engine = workshops[0].open();
        engine.tokenizer().unwrap().decode(tokens)
    };
    let all = decode(text) + &decode(held_back);
    assert!(all.contains(&calibrate::CODE[..100]), "{all}");
    assert!(all.contains("Harrow Point Lighthouse"), "{all}");
    // Nothing is in both.
    let sequences: Vec<&[u32]> = text.chunks_exact(64).collect();
    assert!(held_back.chunks_exact(64).all(|s| !sequences.contains(&s)));
}

/// Calibration on so many tokens of the default text.
fn flap_on(n: usize) -> PruneOptions {
    PruneOptions {
        calibration: CalibrationOptions {
            tokens: Some(n),
            ..CalibrationOptions::default()
        },
        ..flap()
    }
}

#[test]
fn a_model_with_a_chat_template_answers_prompts_in_the_mixture() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    engine.set_chat_template(ChatTemplate::builtin("chatml").unwrap());
    engine.prune(&flap_on(4096), &mut ignore).unwrap();
    let with = texts(&workshop);
    let tokenizer = workshop.open();
    let tokenizer = tokenizer.tokenizer().unwrap();
    let [[text, held_back]] = &with[..] else {
        panic!("one text");
    };
    for text in [text, held_back] {
        let text = tokenizer.decode(text);
        assert!(text.contains("<|im_start|>assistant"), "{text}");
    }
    // Without one it is another text, which is not taken for that one.
    workshop.open().prune(&flap_on(4096), &mut ignore).unwrap();
    let both = texts(&workshop);
    let without = both.iter().find(|text| !with.contains(text)).unwrap();
    assert!(!tokenizer.decode(&without[0]).contains("<|im_start|>"));
    assert_eq!(workshop.cached("profile").len(), 2);
}

#[test]
fn what_the_model_has_written_is_kept_and_not_written_again() {
    let workshop = Workshop::new();
    let options = profiles(PruneOptions {
        target: Target::PerplexityRise(0.5),
        ..flap_on(1024)
    });
    let written = || {
        let mut written = 0;
        let report = workshop.open().prune(&options, &mut |event: Event| {
            if event.stage == Stage::Writing {
                written = event.done;
            }
            ControlFlow::Continue(())
        });
        (written, report.unwrap().ratio)
    };
    let (tokens, ratio) = written();
    assert!(tokens > 0);
    let cache = CacheFolder::new(Some(workshop.path("profiles")), None).unwrap();
    let entries = cache.entries().unwrap();
    let told = entries.iter().find(|entry| entry.kind == CacheKind::Text);
    let tokens_kept = 1024 + 1024;
    assert_eq!(
        told.unwrap().content(),
        Some(CacheContent::Text {
            tokens: tokens_kept
        })
    );
    // The text is read for judging although the profile is there.
    assert_eq!(written(), (0, ratio));
    // Damaged, it is written again, and comes out the same.
    let [path] = &workshop.cached("text")[..] else {
        panic!("one text");
    };
    let whole = fs::read(path).unwrap();
    let mut damaged = whole.clone();
    damaged[100] ^= 1;
    fs::write(path, damaged).unwrap();
    assert_eq!(written(), (tokens, ratio));
    assert_eq!(fs::read(path).unwrap(), whole);
}

#[test]
fn profiles_of_different_texts_are_not_taken_for_each_other() {
    let workshop = Workshop::new();
    let file = TextSource::Path(workshop.write("a.txt", calibrate::TEXT));
    let options = [
        fast(TextSource::Mixture, None),
        fast(TextSource::BuiltIn, None),
        fast(TextSource::Own(512), None),
        fast(file.clone(), None),
        fast(file.clone(), Some(0.5)),
    ];
    for (i, options) in options.iter().enumerate() {
        workshop.prune(&profiles(options.clone()));
        assert_eq!(workshop.cached("profile").len(), i + 1, "{options:?}");
    }
    // The built-in text and a file with the same content are one text.
    workshop.prune(&profiles(fast(file, Some(0.0))));
    assert_eq!(workshop.cached("profile").len(), options.len());
}

#[test]
fn the_mixture_stands_beside_a_named_text_in_its_share() {
    let workshop = Workshop::new();
    // Tokens of this model are bytes.
    let file = TextSource::Path(workshop.write("x.txt", "x".repeat(100_000)));
    let share = |options: &PruneOptions| {
        let mut engine = workshop.open();
        let report = engine.prune(&profiles(options.clone()), &mut ignore);
        let report = report.unwrap();
        let x = engine.tokenizer().unwrap().encode("xx").unwrap()[1];
        let text = texts(&workshop).into_iter().map(|[text, _]| text);
        let text = text.max_by_key(Vec::len).expect("a text");
        fs::remove_dir_all(workshop.path("profiles")).unwrap();
        let of_file = text.iter().filter(|token| **token == x).count();
        (report.calibration, of_file as f64 / text.len() as f64)
    };
    let on = |mix| PruneOptions {
        calibration: CalibrationOptions {
            source: file.clone(),
            mix,
            ..tokens(8192)
        },
        ..fast(file.clone(), mix)
    };
    let (report, quarter) = share(&on(None));
    assert_eq!(report.all_tokens, 8192);
    assert!(report.source.ends_with("x.txt and the mixture"));
    assert!((quarter - 0.75).abs() < 0.07, "{quarter}");
    let (_, half) = share(&on(Some(0.5)));
    assert!((half - 0.5).abs() < 0.07, "{half}");
    // Of a short text all is used, and the shares stay.
    let short = TextSource::Path(workshop.write("short.txt", "x".repeat(3000)));
    let short = PruneOptions {
        calibration: source(short),
        ..on(None)
    };
    let (report, quarter) = share(&short);
    assert!(report.all_tokens < 4096 && (quarter - 0.75).abs() < 0.15);
}

#[test]
fn published_methods_take_a_named_text_as_it_is() {
    let workshop = Workshop::new();
    let file = workshop.write("a.txt", calibrate::TEXT.to_uppercase());
    let mut engine = workshop.open();
    let plain = tokens(512);
    let plain = CalibrationOptions {
        source: TextSource::Path(file.clone()),
        ..plain
    };
    let text = engine.tokenizer().unwrap();
    let text = text
        .encode(&calibrate::TEXT.to_uppercase()[..4096])
        .unwrap();
    let hash = store::hash_tokens(&text[..512], engine.tokenizer().unwrap().bos());
    for method in [Method::Flap, Method::WandaSp, Method::MagnitudeSp] {
        let (profile, _) = engine
            .calibrate(&method.into(), &plain, &mut ignore)
            .unwrap();
        assert_eq!(profile.origin.text, hash);
    }
    let (profile, _) = engine
        .calibrate(&Method::Best.into(), &plain, &mut ignore)
        .unwrap();
    assert_ne!(profile.origin.text, hash);
    let mix = Some(0.0);
    let plain = CalibrationOptions { mix, ..plain };
    let (profile, _): (StoredProfile, _) = engine
        .calibrate(&Method::Best.into(), &plain, &mut ignore)
        .unwrap();
    assert_eq!(profile.origin.text, hash);
}

// ---- texts of answers ----

#[test]
fn an_answer_goes_to_where_it_ends_and_then_comes_the_next_prompt() {
    let synthetic = Synthetic::new(Shape::default());
    let model = synthetic.load();
    let prompts = [vec![41, 42, 43], vec![44, 45], vec![46, 47, 48, 49]];
    // What is never chosen tells prompts from answers.
    let ends: Vec<u32> = (0..10).collect();
    let texts = Texts {
        count: 2,
        answers: Answers {
            count: 5,
            prompts: &prompts,
            ends: &ends,
        },
        tokens: 60,
        bos: Some(40),
        starts: &[11, 12],
        vocabulary: 40,
        seed: 3,
    };
    let write = |texts: &Texts, threads| {
        let written = texts.write(&model, &runtime(threads), &mut progress::ignore);
        written.unwrap()
    };
    let written = write(&texts, 1);
    assert_eq!(write(&texts, 2), written);
    assert_eq!(written.len(), 7);
    for (i, text) in written.iter().enumerate() {
        assert_eq!((text.len(), text[0]), (60, 40));
        if i < 2 {
            assert!(text[1..].iter().all(|token| *token < 40));
            continue;
        }
        let mut rest = &text[1..];
        let mut asked = 0;
        while !rest.is_empty() {
            let prompt = prompts.iter().find(|prompt| {
                let length = prompt.len().min(rest.len());
                prompt[..length] == rest[..length]
            });
            let prompt = prompt.unwrap_or_else(|| panic!("no prompt at {rest:?}"));
            rest = &rest[prompt.len().min(rest.len())..];
            let end = rest.iter().position(|token| ends.contains(token));
            let answer = &rest[..end.map_or(rest.len(), |end| end + 1)];
            assert!(answer.iter().all(|token| *token < 40));
            rest = &rest[answer.len()..];
            asked += 1;
        }
        assert!(asked > 1, "{text:?}");
    }
    // Alone, the answers are the same.
    let alone = Texts { count: 0, ..texts };
    assert_eq!(write(&alone, 2), written[2..]);
}

// ---- effects ----

#[test]
fn likeness_is_that_of_the_definitions() {
    let dense = Synthetic::new(Shape::default());
    let other = Synthetic::new(Shape {
        seed: 77,
        ..Shape::default()
    });
    let (model, other) = (dense.load(), other.load());
    let vocabulary = dense.shape.vocabulary;
    let tokens = Random::new(5).tokens(200, vocabulary);
    let runtime = runtime(2);
    let nothing = &mut progress::ignore;
    let predicted = Predicted::new(&model, &runtime, &tokens, None, 80, nothing).unwrap();
    let same = predicted
        .compare(&model, &runtime, &tokens, None, nothing)
        .unwrap();
    assert_eq!((same.other, same.agreement), (same.this, 1.0));
    assert!(same.divergence < 1e-6);
    let found = predicted
        .compare(&other, &runtime, &tokens, None, nothing)
        .unwrap();
    for (model, found) in [(&model, found.other), (&other, found.this)] {
        let options = PerplexityOptions {
            context: 80,
            chunks: None,
            all_positions: true,
            cache_type: CacheType::F16,
        };
        let expected = eval::perplexity(model, &runtime, &tokens, None, options, nothing).unwrap();
        assert!((found / expected.perplexity - 1.0).abs() < 1e-9);
    }
    let (mut agree, mut divergence) = (0, 0.0);
    for sequence in tokens.chunks_exact(80) {
        let rows = [&model, &other].map(|model| {
            let logits = logits(model, &runtime, &sequence[..79]);
            let rows = logits.chunks_exact(vocabulary).map(|row| {
                let row: Vec<f64> = row.iter().map(|l| f64::from(*l)).collect();
                let sum: f64 = row.iter().map(|l| l.exp()).sum();
                row.iter().map(|l| l.exp() / sum).collect()
            });
            rows.collect::<Vec<Vec<f64>>>()
        });
        for (i, (p, q)) in rows[0].iter().zip(&rows[1]).enumerate() {
            let best = |p: &[f64]| (0..p.len()).max_by(|a, b| p[*a].total_cmp(&p[*b]));
            agree += usize::from(best(p) == best(q));
            // The last 32 positions of a sequence.
            if i >= 79 - 32 {
                let terms = p.iter().zip(q).map(|(p, q)| p * (p / q).ln());
                divergence += terms.sum::<f64>() / 64.0;
            }
        }
    }
    assert!((found.agreement - agree as f64 / 158.0).abs() < 0.02);
    assert!(
        (found.divergence / divergence - 1.0).abs() < 0.05,
        "{found:?}, {divergence}"
    );
}

#[test]
fn effects_are_measured_whatever_it_is_calibrated_on_and_told_again_by_the_next_run() {
    let workshop = Workshop::new();
    let file = TextSource::Path(workshop.write("a.txt", calibrate::TEXT.to_uppercase()));
    let (unseen, mixture, held_back) = (
        EffectText::Unseen,
        EffectText::Mixture,
        EffectText::HeldBack,
    );
    for (source, mix, texts) in [
        (TextSource::Mixture, None, &[mixture][..]),
        (TextSource::BuiltIn, None, &[unseen, held_back]),
        (TextSource::Own(512), None, &[unseen, held_back]),
        (file.clone(), Some(0.0), &[unseen, held_back]),
        (file.clone(), None, &[unseen, mixture]),
    ] {
        let options = PruneOptions {
            effects: true,
            ..fast(source, mix)
        };
        let first = workshop.prune(&options);
        let measured: Vec<EffectText> = first.effects.iter().map(|e| e.text).collect();
        assert_eq!(measured, texts, "{options:?}");
        for effect in &first.effects {
            assert_eq!(effect.tokens, 1024);
            assert!(effect.before > 1.0 && effect.after > 1.0);
            assert!(effect.divergence > 0.0 && effect.agreement < 1.0 && effect.agreement > 0.0);
        }
        let again = workshop.prune(&options);
        assert!(again.repeated);
        assert_eq!(again.effects, first.effects);
    }
    // Where nobody asked the first time, the second measures.
    let options = PruneOptions {
        target: Target::Ratio(0.2),
        ..fast(TextSource::Mixture, None)
    };
    assert!(workshop.prune(&options).effects.is_empty());
    let options = PruneOptions {
        effects: true,
        ..options
    };
    let report = workshop.prune(&options);
    assert!(report.repeated && report.effects.len() == 1);
    assert_eq!(report.effects[0].text, mixture);
    // A profile from a file comes without text.
    let profile = workshop.path("a.profile");
    let mut engine = workshop.open();
    let (stored, _) = engine
        .calibrate(&Method::Flap.into(), &tokens(512), &mut ignore)
        .unwrap();
    stored.save(&profile).unwrap();
    let of_profile = PruneOptions {
        profile: Some(profile),
        effects: true,
        ..by(Method::Flap)
    };
    let report = workshop.prune(&of_profile);
    assert_eq!(report.effects[0].text, held_back);
}

#[test]
fn pruning_that_ruins_the_model_is_warned_of_and_a_gentler_ratio_is_named() {
    let model = default_model();
    let workshop = Workshop::new();
    let run = |amount: &[&str]| {
        let mut arguments = vec!["run", "--method", "flap", "--calib", "built-in"];
        arguments.extend([
            "--calib-tokens",
            "1024",
            "--raw",
            "-p",
            "One",
            "-n",
            "2",
            "-q",
        ]);
        arguments.extend(amount);
        let mut command = crate::common::program::program();
        command.args(arguments).arg("-m").arg(&model);
        command.env("FLAPJACK_CACHE", workshop.path(""));
        crate::common::program::run_with_input(command, b"")
    };
    let output = run(&["--prune", "0.5"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let warning = stderr(&output);
    assert!(warning.contains("times as high"), "{warning}");
    assert!(warning.contains("likely to make no sense"), "{warning}");
    let (_, named) = warning.split_once("--prune ").expect("a ratio");
    let named = named.split(' ').next().unwrap();
    let ratio: f64 = named.parse().unwrap();
    assert!(ratio > 0.0 && ratio < 0.3, "{ratio}");
    assert!(!stdout(&output).contains("perplexity"));
    // It keeps what it promises.
    let output = run(&["--prune", named]);
    assert!(
        !stderr(&output).contains("times as high"),
        "{}",
        stderr(&output)
    );
    // The size that comes to the same is warned of in the same way, where the ratio alone is what it comes from.
    let output = run(&["--fit", "65MB", "--only", "widths"]);
    assert!(
        stderr(&output).contains("--prune 0."),
        "{}",
        stderr(&output)
    );
}
