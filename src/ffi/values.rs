//! Texts and structs that C gives, and structs that it is given.

use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;
use std::ptr;

use super::status::{Failure, call};

// ---- texts ----

/// A text that C has given; `None` for NULL.
///
/// # Safety
/// It is NULL, or ends with a zero byte and stays as it is while it is used.
pub(super) unsafe fn text<'a>(text: *const c_char, what: &str) -> Result<Option<&'a str>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller promises.
    let text = unsafe { CStr::from_ptr(text) };
    match text.to_str() {
        Ok(text) => Ok(Some(text)),
        Err(error) => Err(Failure::argument(format!(
            "{what} is not UTF-8: the byte at offset {} is out of place",
            error.valid_up_to()
        ))),
    }
}

/// A text that there must be.
///
/// # Safety
/// As [`text`].
pub(super) unsafe fn needed_text<'a>(text: *const c_char, what: &str) -> Result<&'a str, Failure> {
    // SAFETY: as the caller promises.
    unsafe { self::text(text, what) }?.ok_or_else(|| is_null(what))
}

/// A path; `None` for NULL. Where the system's paths are bytes, they may be any.
///
/// # Safety
/// As [`text`].
pub(super) unsafe fn path(path: *const c_char, what: &str) -> Result<Option<PathBuf>, Failure> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let _ = what;
        if path.is_null() {
            return Ok(None);
        }
        // SAFETY: as the caller promises.
        let bytes = unsafe { CStr::from_ptr(path) }.to_bytes();
        Ok(Some(std::ffi::OsStr::from_bytes(bytes).into()))
    }
    #[cfg(not(unix))]
    {
        // SAFETY: as the caller promises.
        Ok(unsafe { text(path, what) }?.map(PathBuf::from))
    }
}

/// The texts of a list.
///
/// # Safety
/// The list is NULL, or ends with NULL; its texts are as for [`text`].
pub(super) unsafe fn texts(
    mut list: *const *const c_char,
    what: &str,
) -> Result<Vec<String>, Failure> {
    let mut texts = Vec::new();
    while !list.is_null() {
        // SAFETY: the end of the list has not come yet.
        let Some(next) = unsafe { text(*list, what) }? else {
            break;
        };
        texts.push(next.to_owned());
        // SAFETY: this one was not NULL, so that there is another behind it.
        list = unsafe { list.add(1) };
    }
    Ok(texts)
}

/// A text for C to keep, which it frees by [`flapjack_string_free`].
pub(super) fn given_text(text: String) -> *mut c_char {
    let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
    text.into_raw()
}

/// Frees a text that a function of this library has given to be freed. NULL is let be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flapjack_string_free(text: *mut c_char) {
    if !text.is_null() {
        call(|| {
            // SAFETY: it came from `given_text`.
            drop(unsafe { CString::from_raw(text) });
            Ok(())
        });
    }
}

pub(super) fn is_null(what: &str) -> Failure {
    Failure::argument(format!("{what} is NULL"))
}

/// The place for something that a function gives, which holds NULL until it does.
///
/// # Safety
/// It is NULL, or can be written to.
pub(super) unsafe fn place<'a, T>(
    place: *mut *mut T,
    what: &str,
) -> Result<&'a mut *mut T, Failure> {
    if place.is_null() {
        return Err(is_null(what));
    }
    // SAFETY: as the caller promises. What is in it may never have been written, and so is written before it is looked at.
    unsafe {
        place.write(ptr::null_mut());
        Ok(&mut *place)
    }
}

// ---- structs ----
//
// A program that was compiled with another version's header has structs of another size: later versions add fields at the end. So
// a size goes with every struct, and what one side does not know of, it leaves to the other.

/// A struct of numbers and pointers, of which all bytes make sense.
///
/// # Safety
/// Every pattern of bits is a value of the type.
pub(super) unsafe trait Plain: Copy {}

/// A [`Plain`] struct of options, whose first field is its size.
///
/// # Safety
/// The first field is a `usize`.
pub(super) unsafe trait Options: Plain {
    /// What fills it.
    const FILLED_BY: &str;
}

/// No struct of options will ever be larger. What is, was never filled.
const LARGEST: usize = 4096;

/// Options, as far as C knows of them, and defaults for the rest; defaults alone for NULL.
///
/// # Safety
/// They are NULL, or have as many bytes as their first field says.
pub(super) unsafe fn options<T: Options>(given: *const T, defaults: T) -> Result<T, Failure> {
    if given.is_null() {
        return Ok(defaults);
    }
    let ours = size_of::<T>();
    // SAFETY: the size comes first, as `Options` says.
    let size = unsafe { given.cast::<usize>().read_unaligned() };
    if !(size_of::<usize>()..=LARGEST).contains(&size) {
        let by = T::FILLED_BY;
        return Err(Failure::argument(format!(
            "the options have the size {size}; {by}() fills them"
        )));
    }
    let mut options = defaults;
    // SAFETY: both have so many bytes, and all bytes make sense in a `Plain` struct.
    unsafe {
        ptr::copy_nonoverlapping(
            given.cast::<u8>(),
            (&raw mut options).cast::<u8>(),
            size.min(ours),
        );
    }
    for offset in ours..size {
        // SAFETY: it is within the size.
        if unsafe { given.cast::<u8>().add(offset).read() } != 0 {
            return Err(Failure::argument(
                "the options have something set that this version of flapjack does not know",
            ));
        }
    }
    Ok(options)
}

/// Fills a struct of C's, of `size` bytes, as far as it reaches; what is beyond ours becomes zero. NULL is let be.
///
/// # Safety
/// It is NULL, or has `size` bytes that can be written.
pub(super) unsafe fn fill<T: Plain>(to: *mut T, size: usize, value: &T) {
    if to.is_null() {
        return;
    }
    let ours = size.min(size_of::<T>());
    let bytes = to.cast::<u8>();
    // SAFETY: both have so many bytes.
    unsafe {
        ptr::copy_nonoverlapping(ptr::from_ref(value).cast::<u8>(), bytes, ours);
        bytes.add(ours).write_bytes(0, size - ours);
    }
}

/// Fills a struct of options with defaults, which have `size` as their first field already. One that has no room for that is let be.
///
/// # Safety
/// As [`fill`].
pub(super) unsafe fn fill_options<T: Options>(to: *mut T, size: usize, defaults: &T) {
    if size >= size_of::<usize>() {
        // SAFETY: as the caller promises.
        unsafe { fill(to, size, defaults) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct Old {
        size: usize,
        first: u64,
    }
    #[repr(C)]
    #[derive(Debug, Clone, Copy, PartialEq)]
    struct New {
        size: usize,
        first: u64,
        second: u64,
    }
    // SAFETY: whole numbers without gaps between them, of which the first is a `usize`.
    unsafe impl Plain for Old {}
    // SAFETY: as above.
    unsafe impl Options for Old {
        const FILLED_BY: &str = "old";
    }
    // SAFETY: as above.
    unsafe impl Plain for New {}
    // SAFETY: as above.
    unsafe impl Options for New {
        const FILLED_BY: &str = "new";
    }

    #[test]
    fn a_program_of_an_older_header_gets_defaults_for_what_it_does_not_know() {
        let theirs = Old {
            size: size_of::<Old>(),
            first: 7,
        };
        let defaults = New {
            size: 0,
            first: 1,
            second: 2,
        };
        // SAFETY: it has as many bytes as it says.
        let read = unsafe { options((&raw const theirs).cast::<New>(), defaults) }.unwrap();
        assert_eq!((read.first, read.second), (7, 2));
        // And nothing is written behind what it has.
        let mut room = [Old { size: 0, first: 0 }, Old { size: 5, first: 5 }];
        let filled = New {
            size: size_of::<Old>(),
            ..defaults
        };
        // SAFETY: the first has so many bytes.
        unsafe { fill_options(room.as_mut_ptr().cast::<New>(), size_of::<Old>(), &filled) };
        assert_eq!(
            room[0],
            Old {
                size: size_of::<Old>(),
                first: 1
            }
        );
        assert_eq!(room[1], Old { size: 5, first: 5 });
    }

    #[test]
    fn a_program_of_a_newer_header_is_understood_as_long_as_it_asks_for_nothing_new() {
        let defaults = Old { size: 0, first: 1 };
        let mut theirs = New {
            size: 99,
            first: 99,
            second: 99,
        };
        let filled = Old {
            size: size_of::<New>(),
            ..defaults
        };
        // SAFETY: it has so many bytes.
        unsafe { fill_options((&raw mut theirs).cast::<Old>(), size_of::<New>(), &filled) };
        assert_eq!((theirs.first, theirs.second), (1, 0));
        // SAFETY: it has as many bytes as it says.
        let read = |theirs: &New| unsafe { options(ptr::from_ref(theirs).cast::<Old>(), defaults) };
        assert_eq!(read(&theirs).unwrap().first, 1);
        theirs.second = 1;
        assert!(read(&theirs).unwrap_err().words.contains("does not know"));
        theirs.size = 0;
        assert!(
            read(&theirs)
                .unwrap_err()
                .words
                .contains("old() fills them")
        );
        // SAFETY: NULL is for defaults.
        assert_eq!(unsafe { options(ptr::null(), defaults) }.unwrap(), defaults);
    }
}
