//! Files that are not GGUF files, recognised by how they begin, so that whoever named one learns what it is and what to do with it.

use std::path::Path;

/// What a file is that is not a GGUF file. The words say what to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Foreign {
    #[error(
        "a model in an old format of ggml, from before August 2023, which no recent program reads; fetch the model as GGUF, or convert it anew"
    )]
    OldGgml,
    #[error(
        "a LoRA adapter in an old format of ggml; merge it into its base model, and name that one's .gguf file"
    )]
    OldLora,
    #[error(
        "one with its bytes in the reverse order (big-endian); convert it to little-endian first (gguf_convert_endian.py of llama.cpp)"
    )]
    ReverseGguf,
    #[error(
        "a safetensors file without the files that belong to it; name the folder of the model, with config.json, tokenizer.json and model.safetensors in it"
    )]
    Safetensors,
    #[error(
        "a ZIP archive, as PyTorch writes weights too; unpack the .gguf model that is in it, or convert the model to GGUF first (convert_hf_to_gguf.py of llama.cpp)"
    )]
    Zip,
    #[error(
        "a pickle of Python, as PyTorch writes weights; convert the model to GGUF first (convert_hf_to_gguf.py of llama.cpp)"
    )]
    Pickle,
    #[error("a llamafile, a program with a model in it; `unzip` takes the .gguf model out of it")]
    Llamafile,
    #[error("compressed ({0}); unpack it first")]
    Compressed(&'static str),
    #[error(
        "a web page, or the answer of a server; fetch the file itself (on Hugging Face its address has /resolve/ in it, and not /blob/)"
    )]
    Web,
    #[error("a Git LFS pointer; `git lfs pull` fetches the file that it stands for")]
    LfsPointer,
    #[error("a JSON file; name a .gguf model")]
    Json,
    #[error(
        "nothing but zeros at its beginning, as where a download has not come to its end; fetch it again"
    )]
    Zeros,
    #[error(
        "a piece of a file that was cut up, by its name; join all pieces in their order, for example with `cat`, and name the whole"
    )]
    Piece,
}

/// What a file is that does not begin as a GGUF file does; `None` if that cannot be told.
pub(super) fn recognise(bytes: &[u8]) -> Option<Foreign> {
    let begins = |with: &[u8]| bytes.starts_with(with);
    let word = |with: &str| {
        let text = bytes.trim_ascii_start();
        let head = &text[..text.len().min(with.len())];
        head.eq_ignore_ascii_case(with.as_bytes())
    };
    Some(match () {
        // The magic numbers "ggml", "ggmf" and "ggjt", and that of adapters, as 32-bit integers.
        () if begins(b"lmgg") || begins(b"fmgg") || begins(b"tjgg") => Foreign::OldGgml,
        () if begins(b"algg") => Foreign::OldLora,
        () if begins(b"FUGG") => Foreign::ReverseGguf,
        () if is_safetensors(bytes) => Foreign::Safetensors,
        () if begins(b"MZqFpD") => Foreign::Llamafile,
        () if begins(b"PK\x03\x04") => Foreign::Zip,
        () if begins(b"\x80") && bytes.get(1).is_some_and(|v| (2..=5).contains(v)) => {
            Foreign::Pickle
        }
        () if begins(b"\x1f\x8b") => Foreign::Compressed("gzip"),
        () if begins(b"\xfd7zXZ\0") => Foreign::Compressed("xz"),
        () if begins(b"\x28\xb5\x2f\xfd") => Foreign::Compressed("zstd"),
        () if begins(b"BZh") => Foreign::Compressed("bzip2"),
        () if begins(b"7z\xbc\xaf\x27\x1c") => Foreign::Compressed("7z"),
        () if begins(b"Rar!") => Foreign::Compressed("rar"),
        () if bytes.get(257..262) == Some(b"ustar") => Foreign::Compressed("tar"),
        () if word("version https://git-lfs") => Foreign::LfsPointer,
        () if ["<!doctype", "<html", "<head", "<?xml"]
            .iter()
            .any(|w| word(w)) =>
        {
            Foreign::Web
        }
        () if is_json(bytes) => Foreign::Json,
        () if bytes.len() >= 1024 && bytes[..1024].iter().all(|b| *b == 0) => Foreign::Zeros,
        () => return None,
    })
}

/// A safetensors file begins with the length of its header as 64 bits, and the header is a JSON object.
fn is_safetensors(bytes: &[u8]) -> bool {
    let Some((len, rest)) = bytes.split_first_chunk::<8>() else {
        return false;
    };
    let len = u64::from_le_bytes(*len);
    (2..=rest.len() as u64).contains(&len) && rest[0] == b'{'
}

/// A JSON object begins with a brace, and a name or its end.
fn is_json(bytes: &[u8]) -> bool {
    let text = bytes.trim_ascii_start();
    let Some(rest) = text.strip_prefix(b"{") else {
        return false;
    };
    matches!(rest.trim_ascii_start().first(), Some(b'"' | b'}'))
}

/// Whether a file is a piece of a larger one by its name: `model.gguf.part2of3`, `model.gguf-split-b` and the like.
pub(super) fn is_piece(path: &Path) -> bool {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().to_lowercase());
    name.is_some_and(|name| name.contains(".gguf.part") || name.contains(".gguf-split-"))
}
