//! Random models in memory, with which speed is measured at sizes that nobody wants to download.

use std::process::Command;

use crate::common::pruning::{profile_of, prune, text_for_biases};
use crate::common::synthetic::runtime;
use flapjack::gguf::GgufFile;
use flapjack::model::{Model, Shape};
use flapjack::prune::{Effort, Method};
use flapjack::quant::BlockType;

const SMALL: Shape = Shape {
    name: "small",
    layers: 2,
    embedding_length: 96,
    heads: 6,
    kv_heads: 2,
    head_dim: 32,
    channels: 160,
    vocabulary: 1000,
    tied: false,
    context_length: 64,
};

#[test]
fn weights_have_mean_zero_and_the_variance_of_one_over_their_columns() {
    for block_type in [BlockType::Q4_0, BlockType::Q8_0] {
        let model = Model::synthetic(SMALL, block_type, &runtime(2)).unwrap();
        for weight in [&model.embedding, &model.layers[1].down.weight] {
            let values = weight.decode(&model.map);
            let n = values.len() as f64;
            let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
            let square = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
            let scaled = square * weight.cols as f64;
            assert!((scaled - 1.0).abs() < 0.05, "{block_type:?}: {scaled}");
            // Codes reach from −8 to 7, or −128 to 127, so that their mean is half a step below zero.
            assert!(mean.abs() < 0.15 * square.sqrt(), "{block_type:?}: {mean}");
        }
    }
}

#[test]
fn every_seed_gives_the_same_model_on_any_number_of_threads() {
    let [one, two] = [1, 2].map(|threads| {
        let model = Model::synthetic(SMALL, BlockType::Q4_0, &runtime(threads)).unwrap();
        model.map.bytes().to_vec()
    });
    assert!(one == two);
}

#[test]
fn the_map_holds_a_whole_file() {
    let model = Model::synthetic(SMALL, BlockType::Q8_0, &runtime(2)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.gguf");
    std::fs::write(&path, model.map.bytes()).unwrap();
    let again = Model::load(GgufFile::open(&path).unwrap()).unwrap();
    assert_eq!(again.config, model.config);
    let [a, b] = [&model, &again].map(|m| m.layers[0].q.weight.decode(&m.map));
    assert_eq!(a, b);
}

#[test]
fn a_random_model_can_be_packed_and_pruned() {
    let runtime = runtime(2);
    let mut model = Model::synthetic(SMALL, BlockType::Q4_0, &runtime).unwrap();
    assert!(model.pack(&runtime) > 0);
    let tokens: Vec<u32> = (0..256).map(|i| i * 7 % 1000).collect();
    let text = text_for_biases(&tokens);
    let profile = profile_of(&model, text);
    let before = model.bytes();
    let recipe = Method::Flap.recipe(Effort::Fast);
    prune(&mut model, &profile, text, recipe, 0.3).unwrap();
    assert!(model.bytes() < before);
}

#[test]
fn bench_times_the_shape_of_a_model_of_a_billion_parameters() {
    let output = Command::new(env!("CARGO_BIN_EXE_flapjack"))
        .args([
            "bench",
            "--synthetic",
            "1b",
            "-p",
            "0",
            "-n",
            "1",
            "-r",
            "1",
        ])
        .arg("--json")
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(rows[0]["model_filename"], "1b-Q4_0-synthetic");
    // 1.236e9 weights of 18 bytes in 32, as in Llama 3.2 1B.
    let bytes = rows[0]["bytes_per_token"].as_f64().unwrap();
    assert!(
        (bytes / (1.2357e9 * 18.0 / 32.0) - 1.0).abs() < 1e-3,
        "{bytes}"
    );
}
