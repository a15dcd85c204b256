//! The types and values of metadata.

use crate::count::count;
use std::fmt;

/// The types of metadata values, numbered as in the GGUF specification (`gguf_metadata_value_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// The type with this number; `None` if there is none.
    pub fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        [
            U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64,
        ]
        .into_iter()
        .find(|t| *t as u32 == id)
    }

    /// The smallest number of bytes that a value of this type takes in a file.
    pub(crate) fn min_size(self) -> usize {
        use ValueType::*;
        match self {
            U8 | I8 | Bool => 1,
            U16 | I16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 | String => 8,
            Array => 12,
        }
    }
}

/// A metadata value. Arrays of strings, such as vocabularies, have a variant of their own, so that not every item needs a tag.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    /// An array of items of the given type, which is not `String`.
    Array(ValueType, Vec<Value>),
    /// An array of strings.
    StringArray(Vec<String>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// The type of this value; `Array` for both kinds of arrays.
    pub fn value_type(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(..) | Value::StringArray(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The value of an integer of any width; `None` for everything else.
    pub fn as_i128(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// An integer or float in the type of the value that it takes the place of, if it fits that; without such a value in the
    /// type that GGUF files usually have, 32 bits wide. Other values stay as they are.
    pub(super) fn in_place_of(self, replaced: Option<&Value>) -> Value {
        let wide = self.value_type();
        let to = |value_type| self.converted(value_type);
        let converted = match replaced {
            Some(value) => to(value.value_type()),
            None if self.as_i128().is_some() => to(ValueType::U32).or(to(ValueType::I32)),
            None if wide == ValueType::F64 => to(ValueType::F32),
            None => None,
        };
        converted.unwrap_or(self)
    }

    /// An integer as an integer of another type, or a float as a float; `None` if it does not fit, and for all other values.
    fn converted(&self, to: ValueType) -> Option<Value> {
        let float = match *self {
            Value::F32(v) => f64::from(v),
            Value::F64(v) => v,
            _ => {
                let v = self.as_i128()?;
                return Some(match to {
                    ValueType::U8 => Value::U8(v.try_into().ok()?),
                    ValueType::I8 => Value::I8(v.try_into().ok()?),
                    ValueType::U16 => Value::U16(v.try_into().ok()?),
                    ValueType::I16 => Value::I16(v.try_into().ok()?),
                    ValueType::U32 => Value::U32(v.try_into().ok()?),
                    ValueType::I32 => Value::I32(v.try_into().ok()?),
                    ValueType::U64 => Value::U64(v.try_into().ok()?),
                    ValueType::I64 => Value::I64(v.try_into().ok()?),
                    _ => return None,
                });
            }
        };
        match to {
            ValueType::F32 => Some(Value::F32(float as f32)),
            ValueType::F64 => Some(Value::F64(float)),
            _ => None,
        }
    }
}

/// A short form for messages and listings: of a long string only the beginning, of an array only the type and length.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 60;
        match self {
            Value::Bool(v) => write!(f, "{v}"),
            Value::F32(v) => write!(f, "{v}"),
            Value::F64(v) => write!(f, "{v}"),
            Value::String(s) if s.chars().count() > SHOWN => {
                let head: String = s.chars().take(SHOWN).collect();
                write!(f, "{head:?}…")
            }
            Value::String(s) => write!(f, "{s:?}"),
            Value::Array(t, items) => write!(f, "an array of {} {t:?}", items.len()),
            Value::StringArray(items) => write!(f, "an array of {}", count(items.len(), "string")),
            integer => write!(f, "{}", integer.as_i128().unwrap_or_default()),
        }
    }
}
