//! The engine, on small random models: what it keeps and finds again, what it refuses, what it reaches, and how it is
//! cancelled.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use crate::common::default_model;
use crate::common::engine::{Workshop, break_at, by, flap, source, tokens};
use crate::common::pruning::{assert_computes_the_same, assert_same};
use flapjack::engine::{
    Cache, CalibrationOptions, Engine, EngineError, Event, Found, GenerateOptions, MethodOptions,
    Notice, OpenOptions, OutOfReach, ProfileFrom, PruneOptions, PruneReport, Stage, SyntheticType,
    TINY, Target, TextError, TextSource, Unsuited, ignore, write_synthetic,
};
use flapjack::generate::SamplerConfig;
use flapjack::gguf::{GgufFile, Value};
use flapjack::model::Shape;
use flapjack::prune::{
    Effort, Method, Metric, ProfileError, PruneErrorKind, Record, Restore, StoredProfile,
    Structure, calibrate, groups,
};

/// Long enough a text.
fn prose(from: usize) -> String {
    calibrate::TEXT.chars().skip(from).take(1200).collect()
}

/// The default method, which measures loss curves and fits by least squares.
fn best() -> PruneOptions {
    by(Method::Best)
}

fn damage(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).unwrap();
}

// ---- the cache ----

#[test]
fn the_second_run_takes_the_profile_of_the_first() {
    let workshop = Workshop::new();
    let profile_of = |options: &PruneOptions| workshop.prune(options).calibration.profile;
    let profiles_only = PruneOptions {
        cache: Cache::Profiles,
        ..flap()
    };
    assert_eq!(profile_of(&profiles_only), ProfileFrom::Now);
    assert_eq!(profile_of(&profiles_only), ProfileFrom::File);
    assert_eq!(workshop.cached("outcome").len(), 0);
    // Another text, other tokens, or the wish to do without.
    let path = workshop.write("text.txt", prose(3000));
    let other_text = PruneOptions {
        calibration: source(TextSource::Path(path)),
        ..profiles_only.clone()
    };
    let fewer = PruneOptions {
        calibration: tokens(511),
        ..profiles_only.clone()
    };
    let without = PruneOptions {
        cache: Cache::Nothing,
        ..flap()
    };
    for options in [&other_text, &fewer, &without] {
        assert_eq!(profile_of(options), ProfileFrom::Now);
    }
    assert_eq!(profile_of(&other_text), ProfileFrom::File);
    assert_eq!(workshop.cached("profile").len(), 3);
    // One that is damaged is made again.
    for file in workshop.cached("profile") {
        fs::write(file, b"FLAPPROF").unwrap();
    }
    assert_eq!(profile_of(&profiles_only), ProfileFrom::Now);
    assert_eq!(profile_of(&profiles_only), ProfileFrom::File);
}

#[test]
fn a_profile_is_known_by_what_was_collected_and_not_by_what_is_done_with_it() {
    let workshop = Workshop::new();
    let profile_of = |method: MethodOptions| {
        let options = PruneOptions {
            cache: Cache::Profiles,
            ..by(method)
        };
        workshop.prune(&options)
    };
    let best = MethodOptions::default();
    let first = profile_of(best);
    assert_eq!(first.calibration.profile, ProfileFrom::Now);
    assert!(first.calibration.curves.is_some());
    assert_eq!(
        (first.calibration.tokens, first.calibration.all_tokens),
        (384, 512)
    );
    let second = profile_of(best);
    assert_eq!(second.calibration.profile, ProfileFrom::File);
    assert!(
        second.calibration.curves.is_none(),
        "none were measured now"
    );
    assert_eq!(second.plan, first.plan);
    let with_restore = |restore| MethodOptions {
        restore: Some(restore),
        ..best
    };
    for other in [
        MethodOptions::from(Method::Flap),
        MethodOptions {
            effort: Effort::Fast,
            ..best
        },
        with_restore(Restore::Bias),
    ] {
        assert_eq!(profile_of(other).calibration.profile, ProfileFrom::Now);
    }
    // Where units compete changes nothing of what is collected.
    let elsewhere = MethodOptions {
        structure: Some(Structure::AlMm),
        ..with_restore(Restore::Bias)
    };
    assert_eq!(profile_of(elsewhere).calibration.profile, ProfileFrom::File);
}

#[test]
fn an_outcome_is_repeated_without_its_profile_to_the_bit() {
    let workshop = Workshop::new();
    let mut first = workshop.open();
    let report = first.prune(&best(), &mut ignore).unwrap();
    assert!(!report.repeated);
    let [profile] = &workshop.cached("profile")[..] else {
        panic!("one profile, and not {:?}", workshop.cached("profile"));
    };
    // Of the profile nothing is read but what it says that it is.
    damage(profile);
    let mut second = workshop.open();
    let again = second.prune(&best(), &mut ignore).unwrap();
    assert!(again.repeated);
    assert_eq!(again.calibration.profile, ProfileFrom::Unread);
    assert_eq!(again.calibration.hash, report.calibration.hash);
    assert_eq!(again.plan, report.plan);
    assert_same(second.model(), first.model());
    // Another ratio needs the profile, and so makes it anew.
    let more = PruneOptions {
        target: Target::Ratio(0.4),
        ..best()
    };
    let report = workshop.prune(&more);
    assert!(!report.repeated && report.calibration.profile == ProfileFrom::Now);
    // An outcome that is damaged is made anew as well.
    workshop
        .cached("outcome")
        .iter()
        .for_each(|file| damage(file));
    let mut third = workshop.open();
    assert!(!third.prune(&best(), &mut ignore).unwrap().repeated);
    assert_same(third.model(), first.model());
    // Whoever wants none gets none, and the same model.
    let without = PruneOptions {
        cache: Cache::Nothing,
        ..best()
    };
    let mut fourth = workshop.open();
    assert!(!fourth.prune(&without, &mut ignore).unwrap().repeated);
    assert_same(fourth.model(), first.model());
}

#[test]
fn what_depends_on_the_moment_is_not_kept() {
    let workshop = Workshop::new();
    let faster = PruneOptions {
        target: Target::Speedup(1.01),
        ..flap()
    };
    match workshop.try_prune(&faster) {
        Ok(report) => {
            let search = report.search.expect("a ratio was looked for");
            let Found::Speed {
                bytes_before,
                bytes_after,
                before,
                predicted,
            } = search.found
            else {
                panic!("{search:?}");
            };
            assert!(predicted >= 1.01 * before && bytes_after < bytes_before);
            assert!(search.speedup.is_some_and(|factor| factor > 0.0));
            assert!((report.removed - report.ratio).abs() < 0.2);
        }
        // So small a model may spend no time on its weights.
        Err(EngineError::OutOfReach(OutOfReach::Speed { factor, most, .. })) => {
            assert!(factor == 1.01 && most < 1.01);
        }
        Err(error) => panic!("{error}"),
    }
    assert_eq!(workshop.cached("outcome").len(), 0);
    assert_eq!(workshop.cached("profile").len(), 1);
}

#[test]
fn a_cache_that_cannot_be_written_is_no_error() {
    let workshop = Workshop::new();
    workshop.write("profiles", "a file where the folder should be");
    assert_eq!(
        workshop.prune(&flap()).calibration.profile,
        ProfileFrom::Now
    );
}

// ---- profiles from files ----

/// Saves the profile that a method needs.
fn save_profile(workshop: &Workshop, name: &str, method: MethodOptions) -> std::path::PathBuf {
    let path = workshop.path(name);
    let mut engine = workshop.open();
    let (profile, report) = engine
        .calibrate(&method, &tokens(512), &mut ignore)
        .unwrap();
    assert_eq!(profile.save(&path).unwrap(), report.hash);
    path
}

#[test]
fn a_profile_from_a_file_must_have_what_the_method_needs() {
    let workshop = Workshop::new();
    let path = save_profile(&workshop, "plain.profile", Method::Flap.into());
    let by_file = |method: MethodOptions| {
        workshop.try_prune(&PruneOptions {
            profile: Some(path.clone()),
            ..by(method)
        })
    };
    let flap = MethodOptions::from(Method::Flap);
    let report = by_file(flap).unwrap();
    assert_eq!(report.calibration.profile, ProfileFrom::File);
    assert!(by_file(flap).unwrap().repeated);
    let unsuited = |method| match by_file(method) {
        Err(EngineError::Unsuited(unsuited)) => unsuited,
        other => panic!("{other:?}"),
    };
    let profile = path.clone();
    assert_eq!(
        unsuited(Method::Best.into()),
        Unsuited::NoCurves { profile }
    );
    assert!(matches!(
        unsuited(MethodOptions {
            restore: Some(Restore::Lsq),
            ..flap
        }),
        Unsuited::RestoreNeedsCovariances {
            restore: Restore::Lsq,
            ..
        }
    ));
    assert!(matches!(
        unsuited(MethodOptions {
            metric: Some(Metric::Obs),
            ..flap
        }),
        Unsuited::MetricNeedsCovariances {
            metric: Metric::Obs,
            ..
        }
    ));
    let sequential = MethodOptions {
        restore: Some(Restore::Sequential),
        ..flap
    };
    assert_eq!(unsuited(sequential), Unsuited::Sequential);
    // Restoration auto can do without covariances, and tells.
    let fast = MethodOptions {
        effort: Effort::Fast,
        ..MethodOptions::default()
    };
    let notices = by_file(fast).unwrap().calibration.notices;
    let profile = path.clone();
    assert_eq!(notices, [Notice::BiasesForProfile { profile }]);
}

#[test]
fn loss_curves_belong_to_what_they_were_measured_by() {
    let workshop = Workshop::new();
    let with_curves = MethodOptions {
        structure: Some(Structure::Curves),
        restore: Some(Restore::Bias),
        ..MethodOptions::default()
    };
    let profile = save_profile(&workshop, "curves.profile", with_curves);
    let by_file = |method: MethodOptions| {
        workshop.try_prune(&PruneOptions {
            profile: Some(profile.clone()),
            ..by(method)
        })
    };
    let stored = StoredProfile::load(&profile).unwrap();
    assert!(stored.profile.curves.is_some() && !stored.profile.has_covariance());
    let error = by_file(MethodOptions::default()).unwrap_err();
    let EngineError::Unsuited(Unsuited::OtherCurves { theirs, ours, .. }) = error else {
        panic!("{error}");
    };
    assert_eq!(
        (theirs.restore, ours.restore),
        (Restore::Bias, Restore::Auto)
    );
    let report = by_file(with_curves).unwrap();
    assert_eq!(
        report.calibration.tokens, 384,
        "without those of the curves"
    );
}

#[test]
fn a_profile_of_another_model_is_refused_by_name() {
    let workshop = Workshop::new();
    let profile = save_profile(&workshop, "a.profile", Method::Flap.into());
    let source = GgufFile::open(&workshop.model).unwrap();
    let mut writer = crate::common::copy_of(&source);
    writer.metadata("general.description", Value::String("another".into()));
    let other = workshop.path("other.gguf");
    writer.save(&other).unwrap();
    let options = PruneOptions {
        profile: Some(profile),
        ..flap()
    };
    let mut engine = workshop.open_file(&other);
    let error = engine.prune(&options, &mut ignore).unwrap_err();
    assert!(
        matches!(
            &error,
            EngineError::Profile(ProfileError::OtherModel { .. })
        ),
        "{error}"
    );
    let message = error.to_string();
    for word in ["a.profile", "tiny.gguf", "other.gguf"] {
        assert!(message.contains(word), "{word} in {message}");
    }
}

// ---- texts ----

/// What is collected of a source by FLAP.
fn collected(
    workshop: &Workshop,
    calibration: &CalibrationOptions,
) -> Result<StoredProfile, EngineError> {
    let mut engine = workshop.open();
    let (profile, _) = engine.calibrate(&Method::Flap.into(), calibration, &mut ignore)?;
    Ok(profile)
}

#[test]
fn a_text_is_the_same_from_a_file_a_folder_json_lines_or_a_reader() {
    let workshop = Workshop::new();
    let (one, two) = (prose(0), prose(5000));
    let whole = format!("{one}\n\n{two}");
    let file = workshop.write("whole.txt", &whole);
    let expected = collected(&workshop, &source(TextSource::Path(file))).unwrap();

    workshop.write("folder/b/two.md", &two);
    workshop.write("folder/a.txt", &one);
    workshop.write("folder/.hidden", "this is passed over");
    workshop.write("folder/picture.png", [0x89, b'P', 0, 0, 0xff]);
    let lines = [&one, &two].map(|t| serde_json::json!({ "title": "x", "body": t }).to_string());
    let lines = workshop.write("texts.jsonl", lines.join("\n") + "\n\n");
    let body = |calibration| CalibrationOptions {
        field: Some("body".into()),
        ..calibration
    };
    let reader = TextSource::reader("a reader", move || {
        Ok(Box::new(Cursor::new(whole.clone().into_bytes())))
    });
    for calibration in [
        source(TextSource::Path(workshop.path("folder"))),
        body(source(TextSource::Path(lines))),
        source(reader),
    ] {
        let profile = collected(&workshop, &calibration).unwrap();
        assert_eq!(profile.origin.text, expected.origin.text, "{calibration:?}");
        assert_eq!(profile.profile, expected.profile);
        assert_eq!(profile.origin.source, calibration.source.to_string());
    }
}

#[test]
fn texts_that_are_of_no_use_are_refused_with_the_reason() {
    let workshop = Workshop::new();
    let line = |field: &str| serde_json::json!({ field: prose(0) }).to_string();
    let odd = format!("{}\n{{\"text\": 5}}\n", line("text"));
    fs::create_dir(workshop.path("empty")).unwrap();
    let refused = |path| match collected(&workshop, &source(TextSource::Path(path))) {
        Err(EngineError::Text(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(
        refused(workshop.write("latin.txt", b"caf\xe9")),
        TextError::NotUtf8 { offset: 3, .. }
    ));
    assert!(matches!(
        refused(workshop.path("empty")),
        TextError::NoTextFiles { .. }
    ));
    assert!(matches!(
        refused(workshop.path("nothing.txt")),
        TextError::Read { .. }
    ));
    assert!(matches!(
        refused(workshop.write("not.jsonl", "not json")),
        TextError::NotJson { line: 1, .. }
    ));
    assert!(matches!(
        refused(workshop.write("odd.jsonl", odd)),
        TextError::NoField { line: 2, others, .. } if others.is_empty()
    ));
    assert!(matches!(
        refused(workshop.write("other.jsonl", line("body"))),
        TextError::NoField { line: 1, others, .. } if others == ["body"]
    ));
}

#[test]
fn a_text_must_be_long_enough_for_what_is_taken_from_it() {
    let workshop = Workshop::new();
    let least = |options: &PruneOptions| {
        let error = workshop.try_prune(options).unwrap_err();
        let EngineError::While { source, .. } = error else {
            panic!("{error}");
        };
        match *source {
            EngineError::Prune(error) => match error.kind {
                PruneErrorKind::TooShort { tokens: 100, least } => least,
                other => panic!("{other}"),
            },
            other => panic!("{other}"),
        }
    };
    let short = |options: PruneOptions| PruneOptions {
        calibration: tokens(100),
        ..options
    };
    assert_eq!(least(&short(flap())), 128);
    assert_eq!(least(&short(best())), 192);
    let judged = PruneOptions {
        target: Target::PerplexityRise(0.1),
        ..short(best())
    };
    assert_eq!(least(&judged), 448);
    let own = PruneOptions {
        calibration: source(TextSource::Own(100)),
        ..flap()
    };
    assert_eq!(least(&own), 128, "before the model has written anything");
}

#[test]
fn more_text_than_the_effort_takes_is_noticed() {
    let workshop = Workshop::new();
    let fast = PruneOptions {
        method: MethodOptions {
            effort: Effort::Fast,
            ..Method::Flap.into()
        },
        calibration: source(TextSource::BuiltIn),
        ..PruneOptions::default()
    };
    let prepared = workshop.open().prepare(&fast).map(|p| p.notices().to_vec());
    let source = "the built-in text".to_owned();
    assert_eq!(
        prepared.unwrap(),
        [Notice::FirstTokens {
            source,
            tokens: 4096
        }]
    );
}

#[test]
fn what_an_effort_has_time_for_is_known_before_it_begins() {
    let folder = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        cache: Some(folder.path().to_owned()),
        ..OpenOptions::default()
    };
    let engine = Engine::open(default_model(), options).unwrap();
    let notice = |effort| {
        let options = PruneOptions {
            method: MethodOptions {
                effort,
                ..MethodOptions::default()
            },
            ..PruneOptions::default()
        };
        let prepared = engine.prepare(&options).unwrap();
        let notices = prepared.notices().iter();
        let mut efforts = notices.filter(|n| matches!(n, Notice::Effort { .. }));
        efforts.next().cloned().expect("it takes a while")
    };
    for (wanted, expected) in [
        (Effort::Fast, (4096, None, Restore::Auto, 10)),
        (Effort::Normal, (24_576, Some((512, 2)), Restore::Auto, 60)),
        (
            Effort::Best,
            (73_728, Some((4096, 1)), Restore::Sequential, 600),
        ),
    ] {
        let Notice::Effort {
            effort,
            time,
            tokens,
            curves,
            restore,
            less,
        } = notice(wanted)
        else {
            unreachable!("others were passed over");
        };
        let most = std::time::Duration::from_secs(expected.3);
        assert!(time <= most && time > most / 3, "{effort:?}: {time:?}");
        assert_eq!(
            (tokens, curves, restore),
            (expected.0, expected.1, expected.2)
        );
        assert!(!less && effort == wanted);
    }
}

#[test]
fn the_model_writes_its_own_text_once() {
    let workshop = Workshop::new();
    let own = PruneOptions {
        calibration: source(TextSource::Own(256)),
        cache: Cache::Profiles,
        ..flap()
    };
    let written = |engine: &mut Engine| {
        let mut written = 0;
        let report = engine.prune(&own, &mut |event: Event| {
            if event.stage == Stage::Writing {
                written = event.done;
            }
            std::ops::ControlFlow::Continue(())
        });
        (written, report.unwrap())
    };
    let (tokens, report) = written(&mut workshop.open());
    assert!(tokens >= 256);
    assert_eq!(report.calibration.source, "the model's own text");
    assert_eq!(report.calibration.tokens, 256);
    let (tokens, report) = written(&mut workshop.open());
    assert_eq!((tokens, report.calibration.profile), (0, ProfileFrom::File));
    // If it were written again, it would be the same.
    let [kept] = &workshop.cached("profile")[..] else {
        panic!("one profile, and not {:?}", workshop.cached("profile"));
    };
    let again = collected(&workshop, &own.calibration).unwrap();
    assert_eq!(StoredProfile::load(kept).unwrap().profile, again.profile);
}

// ---- memory ----

/// The default method without loss curves, in so much memory.
fn within(memory: u64, restore: Restore) -> PruneOptions {
    let method = MethodOptions {
        restore: Some(restore),
        effort: Effort::Fast,
        ..MethodOptions::default()
    };
    let options = by(method);
    PruneOptions {
        calibration: CalibrationOptions {
            memory: Some(memory),
            ..options.calibration
        },
        ..options
    }
}

/// Bytes that the covariances of a layer take.
fn layer_bytes(workshop: &Workshop) -> u64 {
    groups::covariance_bytes(&workshop.open().model().layers[0])
}

#[test]
fn within_little_memory_the_outcome_is_the_same() {
    let workshop = Workshop::new();
    let layer = layer_bytes(&workshop);
    let prune = |memory| {
        let mut engine = workshop.open();
        let options = within(memory, Restore::Lsq);
        let report = engine.prune(&options, &mut ignore).unwrap();
        (engine, report)
    };
    let (at_once, report) = prune(3 * layer);
    assert_eq!((report.calibration.groups, report.repeated), (None, false));
    let (in_groups, report) = prune(2 * layer);
    assert_eq!(
        (report.calibration.groups, report.repeated),
        (Some(2), false)
    );
    assert_same(in_groups.model(), at_once.model());
    // How many groups there are changes nothing.
    let (one_by_one, report) = prune(layer);
    assert!(report.repeated);
    assert_same(one_by_one.model(), at_once.model());
    assert_eq!(workshop.cached("profile").len(), 2);
}

#[test]
fn loss_curves_are_measured_in_groups_too() {
    let workshop = Workshop::new();
    let prune = |memory| {
        let options = PruneOptions {
            calibration: CalibrationOptions {
                memory,
                ..tokens(512)
            },
            ..best()
        };
        let mut engine = workshop.open();
        let mut passes = 0;
        let report = engine.prune(&options, &mut |event: Event| {
            let whole = event.stage == Stage::Covariances && event.done == event.total;
            passes += usize::from(whole);
            std::ops::ControlFlow::Continue(())
        });
        (engine, report.unwrap(), passes)
    };
    let (at_once, report, passes) = prune(None);
    assert!(report.calibration.curves.is_some() && passes == 0);
    let (in_groups, report, passes) = prune(Some(layer_bytes(&workshop)));
    assert_eq!(report.calibration.groups, Some(3));
    assert_eq!(
        passes, 4,
        "the layer in the middle is passed over, and the last group of the curves is the first to be restored"
    );
    assert_same(in_groups.model(), at_once.model());
}

#[test]
fn memory_for_less_than_a_layer_means_biases_or_an_error() {
    let workshop = Workshop::new();
    let little = layer_bytes(&workshop) - 1;
    let report = workshop.prune(&within(little, Restore::Auto));
    let [Notice::BiasesForMemory(shortage)] = report.calibration.notices[..] else {
        panic!("{:?}", report.calibration.notices);
    };
    assert_eq!((shortage.needed, shortage.allowed), (little + 1, little));
    assert!(shortage.set);
    let error = workshop
        .try_prune(&within(little, Restore::Lsq))
        .unwrap_err();
    assert!(matches!(error, EngineError::LayerMemory { .. }), "{error}");
    let mut options = within(2 * little, Restore::Lsq);
    options.method.metric = Some(Metric::Obs);
    let error = workshop.try_prune(&options).unwrap_err();
    assert!(matches!(error, EngineError::MetricMemory { .. }), "{error}");
}

// ---- targets ----

#[test]
fn weights_fit_in_the_bytes_that_are_asked_for_and_hardly_less() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    let dense = engine.report().bytes as u64;
    let limit = dense * 7 / 10;
    let options = |bytes| PruneOptions {
        target: Target::Bytes(bytes),
        ..flap()
    };
    let report = engine.prune(&options(limit), &mut ignore).unwrap();
    let left = engine.report().bytes as u64;
    assert!(left <= limit && left > limit * 9 / 10, "{left} of {limit}");
    let found = Found::Bytes {
        before: dense,
        after: left,
    };
    assert_eq!(report.search.unwrap().found, found);
    let again = workshop.prune(&options(limit));
    assert!(again.repeated);
    assert_eq!(again.search.unwrap().found, found);
    let error = workshop.try_prune(&options(1000)).unwrap_err();
    let EngineError::OutOfReach(OutOfReach::Bytes { bytes: 1000, least }) = error else {
        panic!("{error}");
    };
    assert!((least as u64) < left);
}

#[test]
fn a_perplexity_is_kept_to_on_text_that_was_held_back() {
    let workshop = Workshop::new();
    let options = |limit| PruneOptions {
        target: Target::PerplexityRise(limit),
        calibration: tokens(1024),
        ..flap()
    };
    let report = workshop.prune(&options(0.5));
    let Some(Found::Perplexity {
        tokens,
        dense,
        rise,
        ..
    }) = report.search.map(|search| search.found)
    else {
        panic!("{:?}", report.search);
    };
    assert_eq!((tokens, report.calibration.tokens), (256, 768));
    assert!(dense > 1.0 && rise <= 0.5 && report.ratio > 0.0);
    assert!(workshop.prune(&options(0.5)).repeated);
}

// ---- cancelling ----

#[test]
fn pruning_can_be_cancelled_at_every_stage() {
    let workshop = Workshop::new();
    let dense = workshop.open();
    let in_groups = PruneOptions {
        calibration: CalibrationOptions {
            memory: Some(layer_bytes(&workshop)),
            ..tokens(512)
        },
        cache: Cache::Nothing,
        ..best()
    };
    let own = PruneOptions {
        calibration: source(TextSource::Own(512)),
        ..in_groups.clone()
    };
    let judged = PruneOptions {
        target: Target::PerplexityRise(0.5),
        calibration: tokens(1024),
        ..in_groups.clone()
    };
    for (options, stage, done) in [
        (&own, Stage::Writing, 1),
        (&own, Stage::Calibrating, 1),
        (&in_groups, Stage::Calibrating, 512 - 128),
        (&in_groups, Stage::Covariances, 1),
        (&in_groups, Stage::Curves, 3),
        (&judged, Stage::Searching, 0),
        (&judged, Stage::Searching, 1),
        (&in_groups, Stage::Pruning, 0),
    ] {
        let mut engine = workshop.open();
        let error = engine
            .prune(options, &mut break_at(stage, done))
            .unwrap_err();
        assert!(
            matches!(error, EngineError::Cancelled(_)),
            "{stage:?}: {error}"
        );
        assert_same(engine.model(), dense.model());
        // It can be pruned as if nothing had been.
        assert!(engine.prune(&flap(), &mut ignore).is_ok());
    }
}

#[test]
fn a_model_that_is_pruned_in_part_says_so_and_is_not_pruned_again() {
    let workshop = Workshop::new();
    let kept = flap();
    workshop.prune(&kept);
    let anew = PruneOptions {
        cache: Cache::Nothing,
        ..flap()
    };
    for options in [&anew, &kept] {
        let mut engine = workshop.open();
        let error = engine
            .prune(options, &mut break_at(Stage::Pruning, 1))
            .unwrap_err();
        let EngineError::Prune(error) = error else {
            panic!("{error}");
        };
        assert!(error.is_cancelled());
        assert_eq!(error.touched, [0]);
        let error = engine.prune(&flap(), &mut ignore).unwrap_err();
        assert!(matches!(error, EngineError::AlreadyPruned), "{error}");
        let error = engine.export(workshop.path("part.gguf")).unwrap_err();
        assert!(matches!(error, EngineError::BrokenOff), "{error}");
    }
}

#[test]
fn cancelling_when_all_is_pruned_leaves_effects_unmeasured() {
    let workshop = Workshop::new();
    let file = workshop.write("own.txt", calibrate::TEXT.to_uppercase());
    let options = PruneOptions {
        calibration: CalibrationOptions {
            source: TextSource::Path(file),
            ..tokens(512)
        },
        effects: true,
        ..flap()
    };
    let mut engine = workshop.open();
    let mut pruned = false;
    let report = engine.prune(&options, &mut |event: Event| {
        pruned |= event.stage == Stage::Pruning && event.done == event.total;
        match pruned && event.stage == Stage::Effects {
            true => std::ops::ControlFlow::Break(()),
            false => std::ops::ControlFlow::Continue(()),
        }
    });
    assert_eq!(report.unwrap().effects, []);
    assert!(engine.pruned().is_some());
}

/// An outcome of a run that asked for no effects gets them from the first that does.
#[test]
fn effects_that_are_measured_later_are_kept() {
    let workshop = Workshop::new();
    let file = workshop.write("own.txt", calibrate::TEXT.to_uppercase());
    let asking = |effects| PruneOptions {
        calibration: CalibrationOptions {
            source: TextSource::Path(file.clone()),
            ..tokens(512)
        },
        effects,
        ..flap()
    };
    let prune = |effects| {
        let mut measured = false;
        let mut watch = |event: Event| {
            measured |= event.stage == Stage::Effects;
            std::ops::ControlFlow::Continue(())
        };
        let report = workshop.open().prune(&asking(effects), &mut watch);
        (report.unwrap(), measured)
    };
    let (first, measured) = prune(false);
    assert!(!first.repeated && !measured && first.effects.is_empty());
    let (second, measured) = prune(true);
    assert!(second.repeated && measured && !second.effects.is_empty());
    let (third, measured) = prune(true);
    assert!(third.repeated && !measured);
    assert_eq!(third.effects, second.effects);
    assert_eq!(third.plan, first.plan);
    // Who asks for none gets none.
    let (fourth, measured) = prune(false);
    assert!(fourth.repeated && !measured && fourth.effects.is_empty());
}

// ---- reports, files and other models ----

#[test]
fn reports_are_data() {
    let workshop = Workshop::new();
    let options = PruneOptions {
        target: Target::Bytes(400_000),
        ..best()
    };
    let report = workshop.prune(&options);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["target"]["bytes"], 400_000);
    assert_eq!(json["ratio"], report.ratio);
    assert_eq!(json["recipe"]["metric"], "wifv");
    assert_eq!(json["calibration"]["source"], "the built-in text");
    assert_eq!(json["calibration"]["profile"], "now");
    assert!(json["calibration"]["curves"]["time"].is_f64());
    assert!(json["search"]["found"]["bytes"]["after"].as_u64().unwrap() <= 400_000);
    assert_eq!(json["before"]["layers"].as_array().unwrap().len(), 3);
    assert_eq!(json["before"]["layers"][0]["down_type"], "Q8_0");
    let model = serde_json::to_value(workshop.open().report()).unwrap();
    assert_eq!(
        (&model["layers"], &model["threads"]),
        (&3.into(), &1.into())
    );
}

/// Prunes and writes the model; what the file holds.
fn export(workshop: &Workshop, options: &PruneOptions, name: &str) -> (PruneReport, Vec<u8>) {
    let mut engine = workshop.open();
    let report = engine.prune(options, &mut ignore).unwrap();
    let path = workshop.path(name);
    let written = engine.export(&path).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(written.bytes, bytes.len() as u64);
    (report, bytes)
}

#[test]
fn a_file_is_the_same_whether_its_model_was_pruned_now_or_before() {
    let workshop = Workshop::new();
    let (now, first) = export(&workshop, &best(), "a.gguf");
    let (before, second) = export(&workshop, &best(), "b.gguf");
    assert!(!now.repeated && before.repeated);
    assert!(first == second);
    let file = GgufFile::open(workshop.path("a.gguf")).unwrap();
    let record = Record::from_gguf(&file).unwrap().expect("a record");
    assert_eq!(record.profile, now.calibration.hash);
    assert_eq!(record.asked, 0.3);
    assert!((record.ratio - now.removed).abs() < 1e-12);
    assert_eq!(record.calibration, "512 tokens of the built-in text");
    assert_eq!(
        record.method,
        "best (wifv, curves, heads by query, restoration auto)"
    );

    // Pruned once more, it is told from the first model.
    let mut engine = workshop.open_file(&workshop.path("a.gguf"));
    engine.prune(&flap(), &mut ignore).unwrap();
    engine.export(workshop.path("c.gguf")).unwrap();
    let file = GgufFile::open(workshop.path("c.gguf")).unwrap();
    let again = Record::from_gguf(&file).unwrap().expect("a record");
    assert_eq!(again.parameters, record.parameters);
    assert!(again.ratio > record.ratio);
}

#[test]
fn a_model_goes_on_as_before_when_it_has_been_written() {
    let workshop = Workshop::new();
    let mut engine = workshop.open();
    engine.prune(&flap(), &mut ignore).unwrap();
    let text = |engine: &Engine| -> String {
        let options = GenerateOptions {
            max_tokens: 16,
            sampler: SamplerConfig::greedy(),
            ..GenerateOptions::default()
        };
        let mut sequence = engine.sequence();
        let pieces = engine
            .generate(&mut sequence, "Once upon", &options)
            .unwrap();
        pieces.map(|piece| piece.unwrap()).collect()
    };
    let before = text(&engine);
    let written = engine.export(workshop.path("a.gguf")).unwrap();
    assert_eq!(text(&engine), before);
    let file = workshop.open_file(&workshop.path("a.gguf"));
    let added = written.added_bytes;
    assert_eq!(file.report().bytes, engine.report().bytes + added);
}

#[test]
fn a_model_that_was_never_pruned_is_written_as_it_is() {
    let workshop = Workshop::new();
    workshop.open().export(workshop.path("copy.gguf")).unwrap();
    let file = GgufFile::open(workshop.path("copy.gguf")).unwrap();
    assert_eq!(Record::from_gguf(&file).unwrap(), None);
    let copy = workshop.open_file(&workshop.path("copy.gguf"));
    assert_computes_the_same(copy.model(), workshop.open().model());
}

#[test]
fn a_model_in_memory_is_pruned_by_given_tokens_and_has_no_file() {
    let options = OpenOptions {
        threads: Some(1),
        ..OpenOptions::default()
    };
    let mut engine = Engine::synthetic(TINY, SyntheticType::Q4_0, options).unwrap();
    let error = engine.prune(&flap(), &mut ignore).unwrap_err();
    assert!(
        matches!(error, EngineError::Text(TextError::NoTokenizer)),
        "{error}"
    );
    assert!(matches!(engine.prompt("x"), Err(EngineError::NoTokenizer)));
    let given = PruneOptions {
        calibration: source(TextSource::Tokens((0..512).map(|i| i % 320).collect())),
        ..best()
    };
    let before = engine.report().bytes;
    let report = engine.prune(&given, &mut ignore).unwrap();
    assert!(engine.report().bytes < before && (report.removed - 0.3).abs() < 0.1);
    assert!(matches!(
        engine.export("never.gguf"),
        Err(EngineError::NoFile)
    ));
}

#[test]
fn a_synthetic_file_is_the_same_every_time_and_takes_any_text() {
    let workshop = Workshop::new();
    let again = workshop.path("again.gguf");
    write_synthetic(&again, TINY, SyntheticType::Q8_0).unwrap();
    assert!(fs::read(&again).unwrap() == fs::read(&workshop.model).unwrap());
    let engine = workshop.open();
    let text = "Zażółć gęślą jaźń \u{1F60A}";
    let tokenizer = engine.tokenizer().unwrap();
    let tokens = tokenizer.encode(text).unwrap();
    assert_eq!(tokens.len(), text.len());
    assert_eq!(tokenizer.decode(&tokens), text);
    let larger = Shape {
        channels: 160,
        ..TINY
    };
    write_synthetic(&again, larger, SyntheticType::Q4_0).unwrap();
    assert_eq!(workshop.open_file(&again).model().layers[0].channels(), 160);
}
