//! Models that are split among several files run, are pruned and written like whole ones, whichever part is named.

use std::path::{Path, PathBuf};

use flapjack::engine::{Engine, GenerateOptions, ignore};
use flapjack::generate::SamplerConfig;
use flapjack::gguf::{GgufError, GgufFile, Map, Part, Value, Writer};

use crate::common::engine::{Workshop, flap};

/// The tensors of part `part` of `count`: the first part has `head` of them.
fn part_of(i: usize, total: usize, count: usize, head: usize) -> usize {
    match i < head {
        true => 0,
        false => 1 + (i - head) * (count - 1) / (total - head),
    }
}

/// Writes the workshop's model in parts, the first with `head` tensors, as `llama-gguf-split` does.
pub fn split(workshop: &Workshop, name: &str, count: usize, head: usize) -> Vec<PathBuf> {
    let source = GgufFile::open(&workshop.model).unwrap();
    let total = source.tensors().len();
    let write = |part: usize| {
        let mut writer = Writer::new();
        if part == 0 {
            for (key, value) in source.entries() {
                writer.metadata(key, value.clone());
            }
        }
        writer
            .metadata("split.no", Value::U16(part as u16))
            .metadata("split.count", Value::U16(count as u16))
            .metadata("split.tensors.count", Value::I32(total as i32));
        for (i, tensor) in source.tensors().iter().enumerate() {
            if part_of(i, total, count, head) == part {
                let bytes = source.bytes(tensor);
                writer.tensor(&tensor.name, &tensor.shape, tensor.block_type, bytes);
            }
        }
        let path = workshop.path(&format!("{name}-{:05}-of-{count:05}.gguf", part + 1));
        writer.save(&path).unwrap();
        path
    };
    (0..count).map(write).collect()
}

fn text(engine: &Engine) -> String {
    let options = GenerateOptions {
        max_tokens: 12,
        ignore_end: true,
        sampler: SamplerConfig::greedy(),
        ..GenerateOptions::default()
    };
    let mut sequence = engine.sequence();
    let generation = engine.generate(&mut sequence, "a b", &options).unwrap();
    generation.map(|piece| piece.unwrap()).collect()
}

#[test]
fn any_part_names_the_whole() {
    let workshop = Workshop::new();
    let whole = GgufFile::open(&workshop.model).unwrap();
    // Also with a first part that holds metadata only.
    for (name, count, head) in [("three", 3, 4), ("meta", 2, 0)] {
        let parts = split(&workshop, name, count, head);
        let mut fingerprints = Vec::new();
        for path in &parts {
            let file = GgufFile::open(path).unwrap();
            assert_eq!(Part::of(&file), None);
            assert_eq!(file.path(), parts[0]);
            assert!(file.entries().eq(whole.entries()));
            for (tensor, expected) in file.tensors().iter().zip(whole.tensors()) {
                assert_eq!(
                    (&tensor.name, &tensor.shape),
                    (&expected.name, &expected.shape)
                );
                assert!(
                    file.bytes(tensor) == whole.bytes(expected),
                    "{}",
                    tensor.name
                );
            }
            assert_eq!(file.tensors().len(), whole.tensors().len());
            let sizes = parts.iter().map(|p| std::fs::metadata(p).unwrap().len());
            assert_eq!(file.file_len() as u64, sizes.sum::<u64>());
            fingerprints.push(file.fingerprint());
        }
        assert!(fingerprints.windows(2).all(|pair| pair[0] == pair[1]));
        assert_ne!(fingerprints[0], whole.fingerprint());
    }
}

#[test]
fn a_split_model_writes_prunes_and_exports_as_the_whole() {
    let workshop = Workshop::new();
    let parts = split(&workshop, "model", 3, 4);
    let before: Vec<_> = parts.iter().map(|p| std::fs::read(p).unwrap()).collect();
    let (mut whole, mut joined) = (workshop.open(), workshop.open_file(&parts[1]));
    assert_eq!(text(&whole), text(&joined));

    let written = [&mut whole, &mut joined].map(|engine| {
        engine.prune(&flap(), &mut ignore).unwrap();
        let path = workshop.path("pruned.gguf");
        let report = engine.export(&path).unwrap();
        assert!(report.bytes < report.source_bytes);
        std::fs::read(path).unwrap()
    });
    let tensors = |bytes: &[u8]| {
        let mut map = Map::anonymous(bytes.len()).unwrap();
        map.bytes_mut().copy_from_slice(bytes);
        GgufFile::from_map(Path::new("pruned"), map).unwrap()
    };
    let [a, b] = written.each_ref().map(|bytes| tensors(bytes));
    assert_eq!(a.tensors().len(), b.tensors().len());
    for (a_tensor, b_tensor) in a.tensors().iter().zip(b.tensors()) {
        assert_eq!(a_tensor.name, b_tensor.name);
        assert!(a.bytes(a_tensor) == b.bytes(b_tensor), "{}", a_tensor.name);
    }
    assert!(b.entries().all(|(key, _)| !key.starts_with("split.")));
    let after: Vec<_> = parts.iter().map(|p| std::fs::read(p).unwrap()).collect();
    assert!(before == after, "the files stay as they are");

    // As it was, from the files again.
    joined.reopen().unwrap();
    let fresh = workshop.open();
    assert_eq!(text(&fresh), text(&joined));
}

#[test]
fn several_files_are_one_map() {
    let folder = tempfile::tempdir().unwrap();
    let paths = [5000usize, 3, 8192].map(|len| {
        let path = folder.path().join(len.to_string());
        std::fs::write(&path, vec![len as u8; len]).unwrap();
        path
    });
    let (mut map, ranges) = Map::open_all(&paths).unwrap();
    for (path, range) in paths.iter().zip(&ranges) {
        assert_eq!(map.bytes()[range.clone()], std::fs::read(path).unwrap());
    }
    let gap = ranges[0].end..ranges[1].start;
    assert!(map.bytes()[gap].iter().all(|b| *b == 0));
    // Written pages belong to the process, and read as the files again once they are let go of.
    map.bytes_mut().fill(7);
    assert_eq!(std::fs::read(&paths[1]).unwrap(), [3; 3]);
    map.release(ranges[2].clone()).unwrap();
    assert_eq!(map.bytes()[ranges[2].clone()], [0; 8192]);
    assert_eq!(map.bytes()[ranges[1].clone()], [7; 3]);
    if let Some(residency) = map.residency() {
        assert!(residency.private > 0 && residency.resident >= residency.private);
    }
    map.reset().unwrap();
    assert_eq!(map.bytes()[ranges[1].clone()], [3; 3]);
    assert_eq!(map.bytes()[ranges[0].clone()], [(5000 % 256) as u8; 5000]);

    let missing = folder.path().join("missing");
    let (place, _) = Map::open_all(&[&paths[0], &missing]).unwrap_err();
    assert_eq!(place, 1);
}

#[test]
fn a_part_of_another_model_is_named() {
    let workshop = Workshop::new();
    let refusal = |path: &Path| {
        let error = GgufFile::open(path).unwrap_err();
        assert!(!matches!(error, GgufError::Io { .. }));
        error.to_string()
    };
    let says = |said: &str, parts: &[&str]| {
        parts
            .iter()
            .for_each(|part| assert!(said.contains(part), "{part:?}: {said}"));
    };
    let copy = |from: &Path, to: &Path| std::fs::copy(from, to).unwrap();

    // Another part under the name of this one.
    let parts = split(&workshop, "twice", 3, 4);
    copy(&parts[1], &parts[2]);
    says(
        &refusal(&parts[0]),
        &[
            "twice-00003-of-00003.gguf is not part 3 of 3",
            "says that it is part 2",
        ],
    );
    // One of a model in another number of parts, and a whole model.
    let parts = split(&workshop, "count", 3, 4);
    copy(&split(&workshop, "other", 2, 4)[1], &parts[1]);
    says(
        &refusal(&parts[0]),
        &["count-00002-of-00003.gguf is not", "one of 2 parts"],
    );
    copy(&workshop.model, &parts[1]);
    says(
        &refusal(&parts[2]),
        &[
            "count-00002-of-00003.gguf",
            "does not say that it is a part",
        ],
    );
    // Of a model that was cut at other places.
    let parts = split(&workshop, "cut", 3, 4);
    copy(&split(&workshop, "elsewhere", 3, 2)[1], &parts[1]);
    says(
        &refusal(&parts[0]),
        &["cut-00002-of-00003.gguf", "an earlier part has the tensor"],
    );
    let parts = split(&workshop, "less", 3, 4);
    copy(&split(&workshop, "more", 3, 9)[1], &parts[1]);
    let said = refusal(&parts[0]);
    assert!(
        said.contains("tensors") || said.contains("tensor"),
        "{said}"
    );
    // A part that is no GGUF file at all is named by its own path.
    std::fs::write(&parts[1], b"nothing").unwrap();
    says(&refusal(&parts[0]), &["less-00002-of-00003.gguf"]);
}
