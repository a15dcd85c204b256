//! Narrow weights: 16-bit floats in 12 bits. Prompts compute the same with them, generated tokens the same up to rounding, and the weights
//! come back to the bit.

use std::path::{Path, PathBuf};

use crate::common::engine::break_at;
use crate::common::products::product;
use crate::common::synthetic::{Shape, Synthetic, each_runtime, logits_in_pieces, runtime};
use crate::common::{Random, doubles, relative_error};
use flapjack::convert::{FileType, Mixture, Types};
use flapjack::engine::{
    Cache, CalibrationOptions, ConvertOptions, Engine, OpenOptions, Pack, PruneOptions, Stage,
    SyntheticType, TINY, TextSource, convert, ignore, write_synthetic,
};
use flapjack::kernels::{Isa, Kernels, MatrixView, Phase, Runtime, Team};
use flapjack::model::{self, Model};
use flapjack::prune::Target;
use flapjack::quant::{BlockType, Layout, encode_narrow, pack};

/// Random rows of numbers that came from bfloat16, but for one of so many, which may be any finite number.
fn random_rows(
    random: &mut Random,
    block_type: BlockType,
    (rows, cols): (usize, usize),
    odd: usize,
) -> Vec<u8> {
    let number = |random: &mut Random| {
        let bits = random.next() as u16;
        match (random.below(odd), block_type) {
            // No number is infinite or not one.
            (0, BlockType::F16) => bits & 0x9fff | (bits & 0x1000) << 2,
            (0, _) => bits & 0xbfff,
            (_, BlockType::F16) => bits & 0xbff8 | 0x0400,
            (..) => bits & 0x87ff | 0x3800,
        }
    };
    let numbers = (0..rows * cols).map(|_| number(random));
    numbers.flat_map(u16::to_le_bytes).collect()
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn products_are_those_of_packed_weights() {
    let mut random = Random::new(1);
    for kernels in Isa::available().filter_map(Kernels::for_isa) {
        let team = Team::solo(kernels);
        for block_type in [BlockType::F16, BlockType::BF16] {
            for shape in [(16, 2048), (64, 576), (48, 1031), (80, 1536), (160, 301)] {
                // With some that are not in their place, and without any.
                for odd in [60, usize::MAX] {
                    let (rows, cols) = shape;
                    let native = random_rows(&mut random, block_type, shape, odd);
                    let narrow = encode_narrow(block_type, shape, &native).expect("it is narrow");
                    let mut packed = native;
                    pack(block_type, cols, &mut packed);
                    let narrow = MatrixView::new(block_type, Layout::Narrow, rows, cols, &narrow);
                    let packed = MatrixView::new(block_type, Layout::Packed, rows, cols, &packed);
                    for (tokens, phase) in [
                        (1, Phase::Decode),
                        (2, Phase::Decode),
                        (5, Phase::Decode),
                        (1, Phase::Prefill),
                        (21, Phase::Prefill),
                    ] {
                        let x = random.normals(tokens * cols, 1.0);
                        let of = |weights| product(&team, weights, &x, phase);
                        let (a, b) = (of(narrow), of(packed));
                        let place =
                            format!("{kernels:?} {block_type:?} {shape:?}, {tokens} {phase:?}");
                        // A generated token adds what is not in its place at the end.
                        match odd == 60 && phase == Phase::Decode {
                            true => assert!(relative_error(&a, &doubles(&b)) < 1e-5, "{place}"),
                            false => assert!(same(&a, &b), "{place}"),
                        }
                    }
                }
            }
        }
    }
}

/// A model whose matrices are large enough to be worth it, with as many tokens and channels.
fn model_of(block_type: BlockType, vocabulary: usize, channels: usize) -> Synthetic {
    Synthetic::new(Shape {
        vocabulary,
        embedding: 256,
        head_dim: 32,
        heads: vec![8, 8],
        kv_heads: vec![4, 4],
        channels: vec![736, channels],
        block_type,
        rope_dim: 32,
        from_bfloat16: true,
        ..Shape::default()
    })
}

fn layouts(model: &Model) -> Vec<Layout> {
    let linears = model.layers.iter().flat_map(|layer| layer.linears());
    let weights = linears.map(|l| &l.weight).chain([model.head()]);
    weights.map(|weight| weight.layout).collect()
}

/// The logits of a prompt, then of tokens one by one, then of some at a time.
fn logits(model: &Model, runtime: &Runtime) -> Vec<f32> {
    let tokens = Random::new(2).tokens(40, 300);
    let pieces = [
        (23, Phase::Prefill),
        (1, Phase::Decode),
        (1, Phase::Decode),
        (5, Phase::Decode),
        (10, Phase::Prefill),
    ];
    logits_in_pieces(model, runtime, &tokens, &pieces)
}

#[test]
fn a_model_computes_the_same_with_fewer_bytes_and_takes_its_weights_back() {
    for block_type in [BlockType::F16, BlockType::BF16] {
        // With and without rows that fill no group, which packed weights have in the native layout.
        for (vocabulary, channels) in [(304, 720), (301, 700)] {
            let synthetic = model_of(block_type, vocabulary, channels);
            for (runtime, allowed) in each_runtime(2, 1e-4) {
                let mut packed = synthetic.load();
                packed.pack(&runtime);
                let mut narrow = synthetic.load();
                narrow.pack(&runtime);
                let spared = narrow.narrow(&runtime);
                assert!(layouts(&narrow).iter().all(|l| *l == Layout::Narrow));
                let read = narrow.bytes_per_token();
                assert_eq!(read, packed.bytes_per_token() - spared, "what is read");
                assert!(read < packed.bytes_per_token() * 78 / 100);
                assert_eq!(narrow.bytes(), packed.bytes(), "as files have it");

                let (a, b) = (logits(&narrow, &runtime), logits(&packed, &runtime));
                let place = format!("{runtime:?} {block_type:?} {vocabulary} {channels}");
                assert!(relative_error(&a, &doubles(&b)) < allowed, "{place}");

                narrow.widen(&runtime);
                assert_eq!(layouts(&narrow), layouts(&packed));
                assert!(narrow.map.bytes() == packed.map.bytes(), "{place}");
                narrow.narrow(&runtime);
                narrow.unpack(&runtime);
                assert!(
                    narrow.map.bytes() == synthetic.load().map.bytes(),
                    "{place}"
                );
            }
        }
    }
}

#[test]
fn weights_that_gain_nothing_stay_as_they_are() {
    let runtime = runtime(2);
    for (why, block_type, embedding, from_bfloat16) in [
        (
            "what lies around the groups takes what is gained",
            BlockType::F16,
            32,
            true,
        ),
        ("most numbers need 16 bits", BlockType::F16, 256, false),
        ("the type has no narrow form", BlockType::Q8_0, 256, true),
    ] {
        let synthetic = Synthetic::new(Shape {
            embedding,
            block_type,
            from_bfloat16,
            ..Shape::default()
        });
        let mut model = synthetic.load();
        model.pack(&runtime);
        assert_eq!(model.narrow(&runtime), 0, "{why}");
        assert!(layouts(&model).iter().all(|l| *l == Layout::Packed));
    }
}

/// A file in this type that opens and can be pruned.
fn file_of(folder: &Path, file_type: FileType) -> PathBuf {
    let shape = model::Shape {
        embedding_length: 256,
        heads: 8,
        kv_heads: 8,
        channels: 736,
        vocabulary: 320,
        ..TINY
    };
    let path = |name: &str| folder.join(name);
    write_synthetic(path("Q8_0"), shape, SyntheticType::Q8_0).expect("it is written");
    let to = |from: &str, file_type: FileType, to: &str| {
        let types = Types::Mixture(Mixture {
            requantize: true,
            ..file_type.into()
        });
        let options = ConvertOptions {
            types,
            importance: None,
            open: OpenOptions::default(),
        };
        convert(path(from), &options, Some(&path(to)), &mut ignore).expect("it is converted");
    };
    // Through bfloat16, as what was trained in it.
    to("Q8_0", FileType::BF16, "BF16");
    to("BF16", file_type, "model");
    path("model")
}

#[test]
fn an_opened_model_is_narrow_also_when_it_is_pruned_and_files_have_all_of_its_bits() {
    for file_type in [FileType::F16, FileType::BF16] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = file_of(folder.path(), file_type);
        let open = |pack: Pack| {
            let options = OpenOptions {
                pack,
                threads: Some(2),
                ..OpenOptions::default()
            };
            Engine::open(&path, options).expect("it opens")
        };
        let export = |engine: &mut Engine| {
            let to = folder.path().join("out.gguf");
            engine.export(&to).expect("it is written");
            std::fs::read(to).expect("it is there")
        };
        let (mut narrow, mut native) = (open(Pack::Auto), open(Pack::Never));
        let read = |engine: &Engine| engine.model().bytes_per_token();
        let all_narrow = |engine: &Engine| {
            let prefers = engine.runtime().kernels.prefers_packed();
            !prefers || layouts(engine.model()).iter().all(|l| *l == Layout::Narrow)
        };
        assert!(all_narrow(&narrow));
        assert!(read(&narrow) < read(&native));
        assert_eq!(export(&mut narrow), export(&mut native), "{file_type:?}");
        assert!(all_narrow(&narrow), "behind an export");
        assert_eq!(narrow.report().bytes, native.report().bytes);

        let prune = PruneOptions {
            target: Target::Ratio(0.3),
            cache: Cache::Nothing,
            calibration: CalibrationOptions {
                source: TextSource::Tokens(Random::new(3).tokens(700, 320).into()),
                ..CalibrationOptions::default()
            },
            ..PruneOptions::default()
        };
        let mut stop = break_at(Stage::Calibrating, 1);
        narrow
            .prune(&prune, &mut stop)
            .expect_err("it is called off");
        assert!(all_narrow(&narrow), "behind what broke off");
        narrow.prune(&prune, &mut ignore).expect("it is pruned");
        let pruned = read(&narrow);
        // Single matrices may be too small now.
        let report = narrow.report();
        assert!(pruned < report.bytes * 97 / 100, "behind pruning");
        // What the exported file has is what was computed with.
        let tokens = Random::new(4).tokens(30, 320);
        let logits = |engine: &Engine| {
            let (model, runtime) = (engine.model(), engine.runtime());
            logits_in_pieces(model, runtime, &tokens, &[(30, Phase::Prefill)])
        };
        let before = logits(&narrow);
        std::fs::write(&path, export(&mut narrow)).expect("it is written");
        let again = open(Pack::Auto);
        assert!(same(&before, &logits(&again)), "{file_type:?}");
        assert_eq!(pruned, read(&again));
        assert_eq!(pruned, read(&narrow));
    }
}
