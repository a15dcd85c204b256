//! `--override-kv`, as in llama.cpp.

use clap::Args;
use flapjack::engine::MetadataValue;

use super::heading;

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = heading::MODEL)]
pub struct OverrideArgs {
    /// Take another value for a key of the model's metadata than its file has, or one that it lacks, for example
    /// tokenizer.ggml.add_bos_token=bool:false (types: int, float, bool, str). Several with commas between, or the option several
    /// times
    #[arg(long, value_name = "KEY=TYPE:VALUE", value_parser = parse)]
    override_kv: Vec<Overrides>,
}

impl OverrideArgs {
    pub fn overrides(&self) -> Vec<(String, MetadataValue)> {
        let all = self.override_kv.iter().flat_map(|given| &given.0);
        all.cloned().collect()
    }
}

/// What one `--override-kv` asks for.
#[derive(Debug, Clone, PartialEq)]
struct Overrides(Vec<(String, MetadataValue)>);

fn parse(text: &str) -> Result<Overrides, String> {
    let fields = fields(text);
    fields
        .iter()
        .map(|f| parse_one(f))
        .collect::<Result<_, _>>()
        .map(Overrides)
}

fn parse_one(text: &str) -> Result<(String, MetadataValue), String> {
    let parts = text
        .split_once('=')
        .and_then(|(key, value)| Some((key, value.split_once(':')?)))
        .filter(|(key, _)| !key.is_empty());
    let Some((key, (value_type, value))) = parts else {
        return Err(format!(
            "{text:?} is not KEY=TYPE:VALUE, for example tokenizer.ggml.add_bos_token=bool:false"
        ));
    };
    let wrong = |what| Err(format!("{value:?}, for {key}, is not {what}"));
    let value = match value_type {
        "int" => match value.parse() {
            Ok(number) => MetadataValue::I64(number),
            Err(_) => return wrong("an integer of 64 bits"),
        },
        "float" => match value.parse::<f64>() {
            Ok(number) if number.is_finite() => MetadataValue::F64(number),
            _ => return wrong("a number"),
        },
        "bool" => match value {
            "true" => MetadataValue::Bool(true),
            "false" => MetadataValue::Bool(false),
            _ => return wrong("true or false"),
        },
        "str" => MetadataValue::String(value.to_owned()),
        other => {
            return Err(format!(
                "{other:?}, for {key}, is not a type; there are int, float, bool and str"
            ));
        }
    };
    Ok((key.to_owned(), value))
}

/// What stands between commas. A field in double quotes may have commas, and doubled quotes, in it.
fn fields(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let field = fields.last_mut().expect("there is always one");
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => {
                field.push('"');
                characters.next();
            }
            '"' if quoted || field.is_empty() => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            other => field.push(other),
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<(String, MetadataValue)> {
        parse(text).expect("it is well formed").0
    }

    #[test]
    fn values_have_a_type_and_come_one_by_one_or_with_commas_between() {
        let entry = |key: &str, value| (key.to_owned(), value);
        assert_eq!(
            parsed("a.b=int:-3,c=float:1e4,d=bool:true,e=str:x=y:z"),
            [
                entry("a.b", MetadataValue::I64(-3)),
                entry("c", MetadataValue::F64(1e4)),
                entry("d", MetadataValue::Bool(true)),
                entry("e", MetadataValue::String("x=y:z".into())),
            ]
        );
        assert_eq!(
            parsed("a=str:,b=bool:false"),
            [
                entry("a", MetadataValue::String(String::new())),
                entry("b", MetadataValue::Bool(false)),
            ]
        );
    }

    #[test]
    fn quotes_keep_commas() {
        assert_eq!(
            parsed(r#""a=str:one, ""two""",b=str:say "no""#),
            [
                (
                    "a".to_owned(),
                    MetadataValue::String(r#"one, "two""#.into())
                ),
                ("b".to_owned(), MetadataValue::String(r#"say "no""#.into())),
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, said) in [
            ("", "KEY=TYPE:VALUE"),
            ("a", "KEY=TYPE:VALUE"),
            ("a=1", "KEY=TYPE:VALUE"),
            ("=int:1", "KEY=TYPE:VALUE"),
            ("a=int:1,", "KEY=TYPE:VALUE"),
            ("a=int:1.5", "\"1.5\", for a, is not an integer"),
            ("a=int:9223372036854775808", "not an integer of 64 bits"),
            ("a=float:x", "not a number"),
            ("a=float:nan", "not a number"),
            ("a=bool:1", "not true or false"),
            ("a=u32:1", "\"u32\", for a, is not a type"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
