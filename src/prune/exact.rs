//! Floating-point numbers in keys and in the headers of files, written as their bits: decimal digits need not give back the
//! same number, and infinity has none.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// For a field of one number: `#[serde(with = "exact")]`.
pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    value.to_bits().serialize(serializer)
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    u64::deserialize(deserializer).map(f64::from_bits)
}

/// For a field of several numbers.
pub mod list {
    use super::*;

    pub fn serialize<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|value| value.to_bits()))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let all = Vec::<u64>::deserialize(deserializer)?;
        Ok(all.into_iter().map(f64::from_bits).collect())
    }
}

/// For a field of a pair of numbers that may be missing.
pub mod optional_pair {
    use super::*;

    type Pair = Option<(f64, f64)>;

    pub fn serialize<S: Serializer>(pair: &Pair, serializer: S) -> Result<S::Ok, S::Error> {
        pair.map(|(a, b)| (a.to_bits(), b.to_bits()))
            .serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Pair, D::Error> {
        let pair = Option::<(u64, u64)>::deserialize(deserializer)?;
        Ok(pair.map(|(a, b)| (f64::from_bits(a), f64::from_bits(b))))
    }
}
