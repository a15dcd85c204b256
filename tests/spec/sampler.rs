//! The steps of sampling, each against values by hand or against its definition, computed without a thought for speed.

use std::collections::{BTreeSet, HashSet};

use flapjack::engine::{GenerateOptions, SequenceOptions};
use flapjack::generate::{Sampler, SamplerConfig, SamplerStep, UnknownStep};

use crate::common::Random;
use crate::common::engine::Workshop;

/// How often each token is drawn in many tries.
fn shares(config: SamplerConfig, logits: &[f32]) -> Vec<f64> {
    const TRIES: usize = 20_000;
    let mut sampler = Sampler::new(config);
    let mut counts = vec![0usize; logits.len()];
    for _ in 0..TRIES {
        counts[sampler.sample(logits, &[]).expect("a token") as usize] += 1;
    }
    counts.iter().map(|c| *c as f64 / TRIES as f64).collect()
}

fn assert_shares(config: SamplerConfig, logits: &[f32], weights: &[f64]) {
    let total: f64 = weights.iter().sum();
    let shares = shares(config, logits);
    for (share, weight) in shares.iter().zip(weights) {
        let expected = weight / total;
        assert!(
            (share - expected).abs() < 0.015,
            "{shares:?} for {weights:?}"
        );
        assert!(*weight > 0.0 || *share == 0.0, "{shares:?} for {weights:?}");
    }
}

fn plain() -> SamplerConfig {
    SamplerConfig::plain(1)
}

/// Everything off, and the most likely token taken.
fn greedy() -> SamplerConfig {
    SamplerConfig {
        temperature: 0.0,
        ..plain()
    }
}

/// Logits of 1/2, 1/4, 1/8, 1/8. The entropy is 1.75 bits.
fn halves() -> Vec<f32> {
    let probabilities = [0.5f32, 0.25, 0.125, 0.125];
    probabilities.iter().map(|p| p.ln() + 3.0).collect()
}

// ---- what takes tokens out ----

#[test]
fn typical_sampling_keeps_tokens_whose_surprise_is_near_the_entropy() {
    // Surprises of 1, 2, 3 and 3 bits are 0.75, 0.25, 1.25 and 1.25 from the entropy.
    let typical = |typical_p| SamplerConfig {
        typical_p,
        ..plain()
    };
    assert_shares(typical(0.2), &halves(), &[0.0, 1.0, 0.0, 0.0]);
    assert_shares(typical(0.6), &halves(), &[2.0, 1.0, 0.0, 0.0]);
    assert_shares(typical(0.8), &halves(), &[4.0, 2.0, 1.0, 0.0]);
    assert_shares(typical(1.0), &halves(), &[4.0, 2.0, 1.0, 1.0]);
}

#[test]
fn xtc_takes_out_what_reaches_the_threshold_but_the_least_likely() {
    let xtc = |xtc_probability, xtc_threshold| SamplerConfig {
        xtc_probability,
        xtc_threshold,
        ..plain()
    };
    assert_shares(xtc(1.0, 0.2), &halves(), &[0.0, 2.0, 1.0, 1.0]);
    // One alone stays.
    assert_shares(xtc(1.0, 0.3), &halves(), &[4.0, 2.0, 1.0, 1.0]);
    // Of equals the last.
    assert_shares(xtc(1.0, 0.1), &halves(), &[0.0, 0.0, 0.0, 1.0]);
    assert_shares(xtc(0.0, 0.1), &halves(), &[4.0, 2.0, 1.0, 1.0]);
    // Above a half there are never two.
    assert_shares(xtc(1.0, 0.6), &halves(), &[4.0, 2.0, 1.0, 1.0]);
    // Half of the time: 1/2 · (4, 2, 1, 1)/8 + 1/2 · (0, 2, 1, 1)/4.
    assert_shares(xtc(0.5, 0.2), &halves(), &[4.0, 6.0, 3.0, 3.0]);
}

#[test]
fn top_n_sigma_keeps_logits_within_deviations_of_the_best() {
    let sigma = |top_n_sigma| SamplerConfig {
        top_n_sigma,
        ..plain()
    };
    // The mean is 1.5, the deviation 0.866; what cannot come does not count.
    let logits = [3.0, 1.0, 1.0, 1.0, f32::NEG_INFINITY];
    assert_shares(sigma(2.3), &logits, &[1.0, 0.0, 0.0, 0.0, 0.0]);
    let e = 2.0f64.exp();
    assert_shares(sigma(2.4), &logits, &[e, 1.0, 1.0, 1.0, 0.0]);
    assert_shares(sigma(-1.0), &logits, &[e, 1.0, 1.0, 1.0, 0.0]);
}

#[test]
fn top_p_of_many_tokens_keeps_what_sorting_all_of_them_would() {
    let mut random = Random::new(3);
    for share in [0.3, 0.9, 0.999] {
        let logits = random.normals(1500, 0.5);
        let weights: Vec<f64> = logits.iter().map(|l| f64::from(*l).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let mut sum = 0.0;
        let kept = order.iter().position(|token| {
            sum += weights[*token] / total;
            sum >= share
        });
        let kept = kept.expect("it is reached") + 1;
        // One more or less by rounding.
        let allowed: HashSet<usize> = order[..kept + 1].iter().copied().collect();
        let config = SamplerConfig {
            top_p: share as f32,
            // As likely as all others.
            temperature: 1e4,
            ..plain()
        };
        let mut sampler = Sampler::new(config);
        let drawn: HashSet<usize> = (0..15_000)
            .map(|_| sampler.sample(&logits, &[]).unwrap() as usize)
            .collect();
        assert!(drawn.is_subset(&allowed));
        assert!(
            drawn.len() >= kept * 99 / 100,
            "{} of {kept} tokens",
            drawn.len()
        );
    }
}

// ---- temperature, Mirostat ----

#[test]
fn a_dynamic_temperature_follows_the_entropy() {
    let dynamic = |temperature, dynatemp_range, dynatemp_exponent| SamplerConfig {
        temperature,
        dynatemp_range,
        dynatemp_exponent,
        ..plain()
    };
    let weights = |temperature: f64| [1.0, 2.0, 3.0, 3.0].map(|bits| (-bits / temperature).exp2());
    // The entropy is 1.75 of 2 bits.
    let expected = weights(0.4 + 0.8 * 0.875);
    assert_shares(dynamic(0.8, 0.4, 1.0), &halves(), &expected);
    let expected = weights(2.0 * 0.875f64.powi(6));
    assert_shares(dynamic(1.0, 1.0, 6.0), &halves(), &expected);
    // Where one is certain, it is taken.
    assert_shares(dynamic(0.5, 0.5, 1.0), &[9.0], &[1.0]);
    assert_shares(dynamic(0.5, 0.5, 1.0), &[500.0, 0.0], &[1.0, 0.0]);
}

#[test]
fn mirostat_lets_no_token_be_too_surprising_and_comes_near_its_target() {
    // Zipf's law over 1000 tokens: an entropy of 7.5 bits.
    let logits: Vec<f32> = (1..=1000).map(|rank| -(rank as f32).ln()).collect();
    for (tau, eta) in [(3.0f64, 0.1f64), (5.0, 0.3)] {
        let config = SamplerConfig {
            mirostat: true,
            mirostat_tau: tau as f32,
            mirostat_eta: eta as f32,
            // None of this counts.
            top_k: 1,
            top_p: 0.0,
            ..plain()
        };
        let mut sampler = Sampler::new(config);
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        let surprise = |token: usize| -(f64::from(logits[token]).exp() / total).log2();
        let mut most = 2.0 * tau;
        let mut sum = 0.0;
        const TOKENS: usize = 2000;
        for _ in 0..TOKENS {
            let token = sampler.sample(&logits, &[]).unwrap() as usize;
            assert!(surprise(token) <= most + 1e-3 || token == 0);
            let kept: f64 = (0..logits.len())
                .filter(|other| surprise(*other) <= most)
                .map(|other| (-surprise(other)).exp2())
                .sum();
            let kept = kept.max((-surprise(0)).exp2());
            let seen = surprise(token) + kept.log2();
            most -= eta * (seen - tau);
            sum += seen;
        }
        let mean = sum / TOKENS as f64;
        assert!((mean - tau).abs() < 0.1, "{mean} bits for {tau}");
    }
}

// ---- biases, bans, penalties ----

#[test]
fn biases_add_to_logits_and_ban() {
    let biased = |bias: &[(u32, f32)], logits: &[f32]| {
        let config = SamplerConfig {
            logit_bias: bias.to_vec(),
            ..greedy()
        };
        Sampler::new(config).sample(logits, &[])
    };
    let logits = [3.0, 2.5, 0.0];
    assert_eq!(biased(&[], &logits), Some(0));
    assert_eq!(biased(&[(1, 0.25)], &logits), Some(0));
    assert_eq!(biased(&[(1, 0.3), (2, 1.0), (1, 0.3)], &logits), Some(1));
    assert_eq!(biased(&[(0, f32::NEG_INFINITY)], &logits), Some(1));
    assert_eq!(biased(&[(7, 100.0)], &logits), Some(0), "there is no 7");
    let endless = [f32::INFINITY, 0.0];
    assert_eq!(biased(&[(0, f32::NEG_INFINITY)], &endless), Some(1));
    let config = SamplerConfig {
        logit_bias: vec![(0, f32::NEG_INFINITY), (2, 2.0f32.ln())],
        ..plain()
    };
    assert_shares(config, &halves(), &[0.0, 2.0, 2.0, 1.0]);
}

#[test]
fn no_ngram_comes_twice() {
    let next = |n, history: &[u32]| {
        let config = SamplerConfig {
            no_repeat_ngram: n,
            ..greedy()
        };
        // The greater the number, the less likely the token.
        let logits = [5.0, 4.0, 3.0, 2.0, 1.0];
        Sampler::new(config).sample(&logits, history)
    };
    assert_eq!(next(3, &[1, 2, 0, 1, 2]), Some(1), "1 2 0 was there");
    assert_eq!(next(3, &[1, 2, 0, 2]), Some(0));
    assert_eq!(next(2, &[2, 0, 2, 1, 2]), Some(2), "2 0 and 2 1 were there");
    assert_eq!(next(1, &[0, 1, 3]), Some(2));
    assert_eq!(next(3, &[0]), Some(0));
    assert_eq!(next(9, &[0, 0]), Some(0));
}

/// The logits after penalties, by their definitions.
fn penalised(config: &SamplerConfig, logits: &[f32], history: &[u32]) -> Vec<f64> {
    let recent = |window: usize| &history[history.len() - window.min(history.len())..];
    let mut logits: Vec<f64> = logits.iter().map(|l| f64::from(*l)).collect();
    for (token, logit) in logits.iter_mut().enumerate() {
        let window = recent(config.repetition_window).iter();
        let count = window.filter(|t| **t as usize == token).count() as f64;
        if count > 0.0 {
            let penalty = f64::from(config.repetition_penalty);
            *logit = if *logit > 0.0 {
                *logit / penalty
            } else {
                *logit * penalty
            };
            *logit -= f64::from(config.frequency_penalty) * count;
            *logit -= f64::from(config.presence_penalty);
        }
        let text = recent(config.dry_window);
        let longest = (1..text.len()).rev().find(|length| {
            let end = &text[text.len() - length..];
            (*length..text.len())
                .any(|at| text[at] as usize == token && text[at - length..at] == *end)
        });
        let Some(longest) = longest else { continue };
        if longest >= config.dry_allowed_length && text.len() > config.dry_allowed_length {
            let beyond = (longest - config.dry_allowed_length) as i32;
            *logit -= f64::from(config.dry_multiplier) * f64::from(config.dry_base).powi(beyond);
        }
    }
    logits
}

#[test]
fn penalties_are_what_they_are_defined_to_be() {
    let mut random = Random::new(11);
    let mut penalties = 0;
    for round in 0..2000 {
        let any = |random: &mut Random, least: f64, most: f64| {
            (least + random.uniform() * (most - least)) as f32
        };
        let all = round % 2 == 0;
        let config = SamplerConfig {
            repetition_penalty: any(&mut random, 0.8, 1.5),
            repetition_window: if all { usize::MAX } else { random.below(12) },
            frequency_penalty: any(&mut random, -0.2, 0.5),
            presence_penalty: any(&mut random, -0.2, 0.5),
            dry_multiplier: any(&mut random, 0.0, 1.0),
            dry_base: any(&mut random, 1.0, 1.5),
            dry_allowed_length: 1 + random.below(3),
            dry_window: if all { usize::MAX } else { random.below(20) },
            ..greedy()
        };
        // Few tokens, so that much is repeated.
        let length = random.below(40);
        let history = random.tokens(length, 3);
        let logits = random.normals(4, 1.0);
        let expected = penalised(&config, &logits, &history);
        let best = (0..4).max_by(|a, b| expected[*a].total_cmp(&expected[*b]));
        let mut order = expected.clone();
        order.sort_by(f64::total_cmp);
        if order[3] - order[2] < 1e-4 {
            continue;
        }
        let sampled = Sampler::new(config.clone()).sample(&logits, &history);
        assert_eq!(
            sampled.map(|t| t as usize),
            best,
            "{config:?} {history:?} {logits:?}"
        );
        // The same where only some are allowed.
        let among = Sampler::new(config).sample_among(&logits, &history, Some(&[1, 3]));
        let better = if expected[1] > expected[3] { 1 } else { 3 };
        assert!(among == Some(better) || (expected[1] - expected[3]).abs() < 1e-4);
        penalties += usize::from(best != (0..4).max_by(|a, b| logits[*a].total_cmp(&logits[*b])));
    }
    assert!(penalties > 300, "they change what is chosen: {penalties}");
}

#[test]
fn dry_follows_no_repetition_over_a_breaker() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let tokenizer = engine.tokenizer().unwrap();
    let id = |text: &str| tokenizer.encode(text).unwrap()[0];
    // By how much `c` must be ahead of `x` to be taken nevertheless.
    let penalty = |text: &str, breakers: &[&str]| {
        let history = tokenizer.encode(text).unwrap();
        let (mut least, mut most) = (0.0f32, 1000.0f32);
        while most - least > 0.001 {
            let ahead = (least + most) / 2.0;
            let config = SamplerConfig {
                dry_multiplier: 1.0,
                dry_base: 2.0,
                dry_allowed_length: 2,
                dry_window: usize::MAX,
                dry_breakers: breakers.iter().map(|b| (*b).to_owned()).collect(),
                ..greedy()
            };
            let mut logits = vec![-10.0; tokenizer.vocab_size()];
            logits[id("x") as usize] = 0.0;
            logits[id("c") as usize] = ahead;
            let mut sampler = Sampler::with_tokenizer(config, tokenizer);
            match sampler.sample(&logits, &history) == Some(id("c")) {
                true => most = ahead,
                false => least = ahead,
            }
        }
        (least * 100.0).round() / 100.0
    };
    // What is repeated: nothing, "ab", "zab", "..zab" and so on; the penalty is 2 to the power of what is beyond two.
    assert_eq!(penalty("abc de", &[]), 0.0);
    assert_eq!(penalty("abc b", &[]), 0.0, "one token may be");
    assert_eq!(penalty("abc, ab", &[]), 1.0);
    assert_eq!(penalty("zabc,zab", &[]), 2.0);
    assert_eq!(penalty("yzabc,yzab", &[]), 4.0);
    assert_eq!(penalty("yzabc,yzab", &["z"]), 1.0);
    assert_eq!(penalty("yzabc,yzab", &["y", "\n"]), 2.0);
    assert_eq!(penalty("yzabc,yzab", &["a"]), 0.0);
    // A breaker of several tokens; a part of one is none.
    assert_eq!(penalty("yzabc,yzab", &["yz"]), 1.0);
    assert_eq!(penalty("yzabc,yzab", &["yzz", "bz"]), 4.0);
    assert_eq!(penalty("zabc,zab", &["", "q"]), 2.0);
    // A breaker itself is not punished.
    assert_eq!(penalty("zabc,zab", &["c"]), 0.0);
}

// ---- the chain ----

#[test]
fn steps_are_taken_in_the_order_that_is_asked_for() {
    let in_order = |steps: &str| SamplerConfig {
        temperature: 0.5,
        min_p: 0.3,
        steps: SamplerStep::list(steps).unwrap(),
        ..plain()
    };
    // The second is half as likely as the best, and a quarter at half the temperature.
    assert_shares(
        in_order("min_p;temperature"),
        &halves(),
        &[4.0, 1.0, 0.0, 0.0],
    );
    assert_shares(
        in_order("temperature;min_p"),
        &halves(),
        &[1.0, 0.0, 0.0, 0.0],
    );
    assert_shares(in_order("min_p"), &halves(), &[2.0, 1.0, 0.0, 0.0]);
    assert_shares(in_order("temperature"), &halves(), &[16.0, 4.0, 1.0, 1.0]);
    assert_shares(in_order(""), &halves(), &[4.0, 2.0, 1.0, 1.0]);

    let names = "Penalties; DRY;top-n-sigma;topk;typical_p;nucleus;minP;xtc;temp";
    assert_eq!(SamplerStep::list(names).unwrap(), SamplerStep::DEFAULT);
    let unknown = SamplerStep::list("top_k;infill");
    assert_eq!(unknown, Err(UnknownStep("infill".into())));
}

#[test]
fn every_step_copes_with_infinities_and_with_few_tokens() {
    let all = SamplerConfig {
        repetition_penalty: 1.3,
        frequency_penalty: 0.1,
        presence_penalty: 0.1,
        dry_multiplier: 1.0,
        dry_allowed_length: 0,
        no_repeat_ngram: 2,
        logit_bias: vec![(0, 1.0)],
        top_n_sigma: 2.0,
        top_k: 3,
        typical_p: 0.5,
        top_p: 0.5,
        min_p: 0.1,
        xtc_probability: 1.0,
        dynatemp_range: 0.5,
        ..SamplerConfig::default()
    };
    let mirostat = SamplerConfig {
        mirostat: true,
        ..all.clone()
    };
    let greedy = SamplerConfig {
        temperature: 0.0,
        ..all.clone()
    };
    let values = [f32::NEG_INFINITY, -1e30, 0.0, 1e30, f32::INFINITY];
    for config in [plain(), all, mirostat, greedy] {
        for a in values {
            for b in values {
                for c in values {
                    let mut sampler = Sampler::new(config.clone());
                    for logits in [&[a][..], &[a, b], &[a, b, c]] {
                        for history in [&[][..], &[0], &[0, 1, 0, 1, 0, 1]] {
                            let token = sampler.sample(logits, history);
                            let token = token.expect("all are numbers");
                            assert!((token as usize) < logits.len());
                        }
                    }
                }
            }
        }
        let mut sampler = Sampler::new(config);
        assert_eq!(sampler.sample(&[0.0, f32::NAN], &[]), None);
    }
}

#[test]
fn only_what_is_allowed_is_chosen() {
    let logits = [9.0, 2.0, 1.0, 5.0];
    let among = |config: SamplerConfig, allowed: &[u32]| {
        Sampler::new(config).sample_among(&logits, &[], Some(allowed))
    };
    assert_eq!(among(greedy(), &[1, 2]), Some(1));
    assert_eq!(among(SamplerConfig::default(), &[2]), Some(2));
    assert_eq!(among(greedy(), &[]), None);
    let drawn: BTreeSet<u32> = (0..200)
        .map(|seed| among(SamplerConfig::plain(seed), &[1, 2]).unwrap())
        .collect();
    assert_eq!(drawn, BTreeSet::from([1, 2]));
    // Where nothing that is allowed can come, something that is allowed does.
    let none = [0.0, f32::NEG_INFINITY, f32::NEG_INFINITY];
    let chosen = Sampler::new(plain()).sample_among(&none, &[], Some(&[1, 2]));
    assert!(matches!(chosen, Some(1 | 2)));
}

#[test]
fn what_a_sequence_has_already_counts_for_penalties() {
    let workshop = Workshop::new();
    let engine = workshop.open();
    let mut sequence = engine.sequence_with(SequenceOptions::default()).unwrap();
    let options = GenerateOptions {
        max_tokens: 12,
        // No token twice.
        sampler: SamplerConfig {
            no_repeat_ngram: 1,
            ..SamplerConfig::greedy()
        },
        ignore_end: true,
        ..GenerateOptions::default()
    };
    let mut seen = Vec::new();
    for prompt in ["ab", "c"] {
        let tokens = engine.tokenizer().unwrap().encode(prompt).unwrap();
        seen.extend_from_slice(&tokens);
        let generation = engine.generate_behind(&mut sequence, tokens, &options);
        let mut generation = generation.unwrap();
        (&mut generation).for_each(|piece| drop(piece.unwrap()));
        seen.extend_from_slice(&generation.generated().unwrap().tokens);
    }
    let distinct: BTreeSet<u32> = seen.iter().copied().collect();
    // The prompt's "c" may have been generated before.
    assert!(distinct.len() + 1 >= seen.len(), "{seen:?}");
    assert_eq!(seen.len(), 27);
}
