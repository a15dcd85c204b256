//! Calibration: profiles as files, and texts that a model writes itself.

use std::fs;

use crate::common::Random;
use crate::common::pruning::{curve_options, curves_of, profile_of, text};
use crate::common::synthetic::{Shape, Synthetic, runtime};
use flapjack::generate::{Answers, Sampler, SamplerConfig, Texts};
use flapjack::gguf::GgufFile;
use flapjack::prune::{
    Calibration, Collected, Covariances, CurveLevels, CurveOptions, Effort, HeadUnit, Method,
    Metric, Origin, ProfileError, Restore, StoredProfile, store,
};

// ---- profiles as files ----

fn stored_profile() -> StoredProfile {
    let synthetic = Synthetic::new(Shape {
        heads: vec![4, 6],
        kv_heads: vec![2, 2],
        channels: vec![50, 70],
        ..Shape::default()
    });
    let tokens = Random::new(9).tokens(300, synthetic.shape.vocabulary);
    let calibration = Calibration {
        bos: Some(1),
        ..text(&tokens)
    };
    let model = synthetic.load();
    let mut profile = profile_of(&model, calibration);
    let options = curve_options(Method::Best.recipe(Effort::Best));
    let curves = curves_of(&model, &profile, calibration, options.clone());
    profile.curves = Some(curves);
    StoredProfile {
        origin: Origin {
            model: GgufFile::open(&synthetic.path).unwrap().fingerprint(),
            model_name: "model.gguf".into(),
            text: store::hash_tokens(&tokens, Some(1)),
            source: "a \"text\"".into(),
            tokens: 300,
            collected: Collected {
                covariances: Covariances::All,
                judge_tokens: 20,
                curves: Some(options),
            },
            flapjack: "0.1.0".into(),
        },
        profile,
    }
}

#[test]
fn a_profile_comes_back_from_its_file_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.profile");
    let profile = stored_profile();
    profile.save(&path).unwrap();
    let again = StoredProfile::load(&path).unwrap();
    assert_eq!(again, profile);
    assert_eq!(again.hash(), profile.hash());
    assert_eq!(fs::read(&path).unwrap(), profile.to_bytes());
}

#[test]
fn a_damaged_profile_is_refused_wherever_the_damage_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.profile");
    let bytes = stored_profile().to_bytes();
    let load = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        StoredProfile::load(&path)
    };
    for place in (0..bytes.len()).step_by(37) {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x10;
        let message = load(&damaged).unwrap_err().to_string();
        assert!(message.contains("a.profile"), "byte {place}: {message}");
        assert!(load(&bytes[..place]).is_err(), "cut off at {place}");
    }
    assert!(matches!(
        load(b"something else entirely"),
        Err(ProfileError::NotAProfile { .. })
    ));
    let mut newer = bytes.clone();
    newer[8] = 99;
    let message = load(&newer).unwrap_err().to_string();
    assert!(
        message.contains("format 99") && !message.contains("--"),
        "{message}"
    );
}

#[test]
fn what_was_collected_comes_back_from_its_text_and_differs_where_any_field_does() {
    let options = curve_options(Method::Best.recipe(Effort::Best));
    let collected = Collected {
        covariances: Covariances::All,
        judge_tokens: 20,
        curves: Some(options.clone()),
    };
    let with = |options| Collected {
        curves: Some(options),
        ..collected.clone()
    };
    let with_levels = |levels| {
        with(CurveOptions {
            levels,
            ..options.clone()
        })
    };
    let levels = &options.levels;
    let all = [
        collected.clone(),
        Collected {
            covariances: Covariances::None,
            ..collected.clone()
        },
        Collected {
            covariances: Covariances::InGroups,
            ..collected.clone()
        },
        Collected {
            judge_tokens: 0,
            ..collected.clone()
        },
        Collected {
            curves: None,
            ..collected.clone()
        },
        with(CurveOptions {
            metric: Metric::Obs,
            ..options.clone()
        }),
        with(CurveOptions {
            heads: HeadUnit::Group,
            ..options.clone()
        }),
        with(CurveOptions {
            restore: Restore::Bias,
            ..options.clone()
        }),
        with_levels(CurveLevels {
            tokens: levels.tokens + 1,
            ..levels.clone()
        }),
        with_levels(CurveLevels {
            sequence: levels.sequence / 2,
            ..levels.clone()
        }),
        with_levels(CurveLevels {
            stride: levels.stride + 1,
            ..levels.clone()
        }),
        with_levels(CurveLevels {
            mlp_shares: vec![0.25, 0.5],
            ..levels.clone()
        }),
        with_levels(CurveLevels {
            attention_shares: vec![1.0 / 9.0, 0.33],
            ..levels.clone()
        }),
        // The same numbers, shared out otherwise.
        with_levels(CurveLevels {
            mlp_shares: levels.attention_shares.clone(),
            attention_shares: levels.mlp_shares.clone(),
            ..levels.clone()
        }),
    ];
    for (i, one) in all.iter().enumerate() {
        let text = serde_json::to_string(one).unwrap();
        assert_eq!(serde_json::from_str::<Collected>(&text).unwrap(), *one);
        for other in &all[i + 1..] {
            assert_ne!(one, other);
            assert_ne!(one.hash(), other.hash(), "{one:?} and {other:?}");
        }
    }
}

#[test]
fn the_hash_of_a_text_depends_on_its_tokens_and_on_what_begins_sequences() {
    let hashes = [
        store::hash_tokens(&[1, 2], None),
        store::hash_tokens(&[2, 1], None),
        store::hash_tokens(&[1, 2], Some(0)),
        store::hash_tokens(&[1, 2], Some(1)),
        store::hash_tokens(&[1], Some(2)),
    ];
    for (i, a) in hashes.iter().enumerate() {
        assert!(hashes[i + 1..].iter().all(|b| a != b));
    }
}

// ---- own text ----

#[test]
fn own_texts_are_the_same_for_any_number_of_threads_and_differ_from_each_other() {
    let synthetic = Synthetic::new(Shape::default());
    let model = synthetic.load();
    let texts = Texts {
        count: 70,
        answers: Answers::default(),
        tokens: 20,
        bos: Some(3),
        starts: &[5, 7],
        vocabulary: 40,
        seed: 1,
    };
    let write = |texts: &Texts, threads| {
        let mut told = 0;
        let written = texts
            .write(&model, &runtime(threads), &mut |done, total| {
                assert!(done > told && done <= total);
                told = done;
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(told, 70 * 20);
        written
    };
    let written = write(&texts, 1);
    assert_eq!(write(&texts, 3), written);
    assert_eq!(written.len(), 70);
    for (i, text) in written.iter().enumerate() {
        assert!(text.len() == 20 && text[0] == 3 && [5, 7].contains(&text[1]));
        assert!(
            text.iter().all(|t| *t < 40),
            "what means nothing is never chosen"
        );
        assert!(written[i + 1..].iter().all(|other| other != text));
    }
    let starts: Vec<u32> = (0..40).collect();
    let any = Texts {
        bos: None,
        starts: &starts,
        ..texts
    };
    let starts: std::collections::BTreeSet<u32> = write(&any, 2).iter().map(|t| t[0]).collect();
    assert!(starts.len() > 10);
}

#[test]
fn at_temperature_1_with_nothing_cut_off_tokens_come_as_often_as_their_probability() {
    let logits = [0.0f32, 1.0, 2.0, f32::NEG_INFINITY, -1.0];
    let config = SamplerConfig {
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        temperature: 1.0,
        seed: 5,
        ..SamplerConfig::default()
    };
    let mut sampler = Sampler::new(config);
    let draws = 20_000;
    let mut counts = [0usize; 5];
    for _ in 0..draws {
        counts[sampler.sample(&logits.clone(), &[]).unwrap() as usize] += 1;
    }
    let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    for (count, logit) in counts.iter().zip(logits) {
        let expected = f64::from(logit).exp() / total;
        let spread = (expected * (1.0 - expected) / draws as f64).sqrt();
        let share = *count as f64 / draws as f64;
        assert!(
            (share - expected).abs() <= 4.0 * spread,
            "{share} of {expected}"
        );
    }
}
