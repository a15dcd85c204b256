//! The map of a model file. It is private and copy-on-write, so that pruning can rewrite weights in place while the file stays
//! as it is.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;

use memmap2::{MmapMut, MmapOptions};

/// A private copy-on-write map of a whole file, of several files one behind the other, or memory without a file that is used in the
/// same way.
///
/// Pages are shared with the file until they are written to. No other program may truncate the file while it is mapped:
/// reading past the new end would kill the process, and a program that maps files cannot prevent that.
#[derive(Debug)]
pub struct Map {
    bytes: Bytes,
}

/// What a map's bytes lie in.
#[derive(Debug)]
enum Bytes {
    One(MmapMut),
    #[cfg(unix)]
    Several(Joined),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::One(map) => map,
            #[cfg(unix)]
            Bytes::Several(map) => map.bytes(),
        }
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Bytes::One(map) => map,
            #[cfg(unix)]
            Bytes::Several(map) => map.bytes_mut(),
        }
    }
}

/// Several files in one range of addresses that was reserved for them, each at the beginning of a page.
#[cfg(unix)]
#[derive(Debug)]
struct Joined {
    start: std::ptr::NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its range of addresses, as a `Vec` does, and is changed through `&mut` only.
#[cfg(unix)]
unsafe impl Send for Joined {}
// SAFETY: as for Send.
#[cfg(unix)]
unsafe impl Sync for Joined {}

#[cfg(unix)]
impl Joined {
    /// Addresses of `len` bytes, a multiple of the page, which read as zeros.
    fn reserve(len: usize) -> io::Result<Self> {
        // SAFETY: a new map at a place that the system chooses touches nothing that is there already.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = std::ptr::NonNull::new(start.cast());
        let start = start.ok_or_else(|| io::Error::other("no addresses"))?;
        Ok(Self { start, len })
    }

    /// Maps the first `len` bytes of a file from byte `at` on, the beginning of a page.
    fn place(&mut self, at: usize, len: usize, file: &File) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        assert!(at.is_multiple_of(page_size()) && at + len <= self.len);
        // SAFETY: the addresses are ours, as checked, and nobody holds a view on them, since we hold `self` exclusively. For the file
        // the same holds as in `Map::open`.
        let placed = unsafe {
            libc::mmap(
                self.start.as_ptr().add(at).cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        match placed == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(()),
        }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the range is mapped for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and we hold `self` exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(unix)]
impl Drop for Joined {
    fn drop(&mut self) {
        // SAFETY: the range is ours, and no view on it can outlive us.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// How much of a map is in physical memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Residency {
    /// Bytes in memory, shared with the file or private.
    pub resident: u64,
    /// Bytes in memory that have been written to and so belong to this process alone; part of `resident`.
    pub private: u64,
}

/// A map of several files, and where in it the bytes of each are.
pub type WithPlaces = (Map, Vec<Range<usize>>);

impl Map {
    /// Maps the file at `path` for reading and for private writing.
    ///
    /// # Errors
    /// Errors of the operating system; also if the file is empty or is not a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let (file, _) = open_file(path)?;
        // No swap space is reserved for pages that may be written to, because a model may be larger than the memory.
        //
        // SAFETY: the map is private, so nothing that we write reaches the file and our own pages change under nobody.
        // Another process that modifies the file while it is mapped can change pages that we have not yet read; all
        // parsing happens on checked ranges and every byte pattern is a valid value of the types that we view.
        let bytes = unsafe { MmapOptions::new().no_reserve_swap().map_copy(&file)? };
        Ok(Self {
            bytes: Bytes::One(bytes),
        })
    }

    /// Maps several files as [`open`](Self::open) does one, and returns where in the map the bytes of each are. Between two files there
    /// are zeros up to the next page.
    ///
    /// # Errors
    /// Those of [`open`](Self::open), and the number of the file that they are about.
    pub fn open_all<P: AsRef<Path>>(paths: &[P]) -> Result<WithPlaces, (usize, io::Error)> {
        Self::open_all_with_room(paths, 0)
    }

    /// The same with so many bytes behind the files that belong to none, and are zeros at first and after a [`reset`](Self::reset). They
    /// begin at the next page.
    ///
    /// # Errors
    /// Those of [`open_all`](Self::open_all).
    pub(crate) fn open_all_with_room<P: AsRef<Path>>(
        paths: &[P],
        room: usize,
    ) -> Result<WithPlaces, (usize, io::Error)> {
        let mut files = Vec::with_capacity(paths.len());
        let (mut ranges, mut end) = (Vec::with_capacity(paths.len()), 0usize);
        for (i, path) in paths.iter().enumerate() {
            let (file, len) = open_file(path.as_ref()).map_err(|error| (i, error))?;
            let too_large = || (i, io::Error::from(io::ErrorKind::FileTooLarge));
            let len = usize::try_from(len).map_err(|_| too_large())?;
            ranges.push(end..end.checked_add(len).ok_or_else(too_large)?);
            end = (end + len)
                .checked_next_multiple_of(page_size())
                .ok_or_else(too_large)?;
            files.push(file);
        }
        let Some(len) = end.checked_add(room.next_multiple_of(page_size())) else {
            return Err((0, io::ErrorKind::FileTooLarge.into()));
        };
        let bytes = join(&files, &ranges, len)?;
        Ok((Self { bytes }, ranges))
    }

    /// Memory of `len` bytes that belongs to no file. It is zeros at first, and zeros again where it was released.
    ///
    /// # Errors
    /// If the operating system does not provide that much memory.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let bytes = MmapMut::map_anon(len)?;
        Ok(Self {
            bytes: Bytes::One(bytes),
        })
    }

    /// All bytes of the map.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All bytes of the map, for writing. Pages that are written to become private to this process.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Several ranges of bytes for writing at the same time, in the order in which they are given. They must not overlap.
    ///
    /// # Panics
    /// If ranges overlap or reach past the end of the map.
    pub fn disjoint_mut(&mut self, ranges: &[Range<usize>]) -> Vec<&mut [u8]> {
        let mut order: Vec<usize> = (0..ranges.len()).collect();
        order.sort_by_key(|i| ranges[*i].start);
        let mut pieces: Vec<&mut [u8]> = ranges.iter().map(|_| &mut [][..]).collect();
        let (mut rest, mut at) = (&mut self.bytes[..], 0);
        for i in order {
            // An empty range overlaps nothing, wherever it is.
            if ranges[i].is_empty() {
                continue;
            }
            let (_, tail) = rest.split_at_mut(ranges[i].start - at);
            let (piece, tail) = tail.split_at_mut(ranges[i].len());
            pieces[i] = piece;
            (rest, at) = (tail, ranges[i].end);
        }
        pieces
    }

    /// Gives the pages that lie wholly inside `range` back to the operating system. What was written to them is lost: they
    /// then read as the file's own bytes, or as zeros if there is no file.
    ///
    /// # Errors
    /// Errors of the operating system.
    pub fn release(&mut self, range: Range<usize>) -> io::Result<()> {
        let page = page_size();
        let start = range.start.next_multiple_of(page);
        let end = range.end.min(self.bytes.len()) / page * page;
        if start >= end {
            return Ok(());
        }
        #[cfg(unix)]
        self.let_go(start..end)?;
        Ok(())
    }

    /// Lets go of everything that was written: the map reads as its file again, or as zeros if there is none, and none of its pages
    /// belongs to this process.
    ///
    /// # Errors
    /// Errors of the operating system; always where it has no such thing. The map is then as it was.
    pub fn reset(&mut self) -> io::Result<()> {
        #[cfg(unix)]
        return self.let_go(0..self.bytes.len());
        #[cfg(not(unix))]
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Lets go of what was written to the pages of a range that begins with a page. A last page that a file fills in part is its too.
    #[cfg(unix)]
    fn let_go(&mut self, range: Range<usize>) -> io::Result<()> {
        match &mut self.bytes {
            // SAFETY: we hold the map exclusively, so nobody holds a view on these bytes while they change, and afterwards
            // they read as the file's own bytes, which are as valid as any.
            Bytes::One(map) => unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.len(),
                )
            },
            Bytes::Several(map) => {
                let bytes = &mut map.bytes_mut()[range];
                // SAFETY: as above; the range is inside of the map, as the slice is.
                let done = unsafe {
                    libc::madvise(bytes.as_mut_ptr().cast(), bytes.len(), libc::MADV_DONTNEED)
                };
                match done {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            }
        }
    }

    /// How much of the map is in memory, in bytes, from `/proc/self/smaps`; `None` if the system has no such file or it cannot
    /// be understood.
    pub fn residency(&self) -> Option<Residency> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let ours = self.bytes.as_ptr() as usize..self.bytes.as_ptr() as usize + self.bytes.len();
        let mut total = Residency {
            resident: 0,
            private: 0,
        };
        let mut inside = false;
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            let head = words.next().unwrap_or_default();
            if let Some((from, to)) = head.split_once('-') {
                let from = usize::from_str_radix(from, 16).ok()?;
                let to = usize::from_str_radix(to, 16).ok()?;
                inside = from < ours.end && to > ours.start;
            } else if inside {
                let mut bytes = || {
                    words
                        .next()
                        .and_then(|v| v.parse::<u64>().ok())
                        .map(|k| k * 1024)
                };
                match head {
                    "Rss:" => total.resident += bytes()?,
                    // Not Private_Dirty or Private_Clean: these also count pages of the file that only this process has mapped.
                    "Anonymous:" => total.private += bytes()?,
                    _ => {}
                }
            }
        }
        Some(total)
    }
}

/// Opens a file that can be mapped, and tells its length.
fn open_file(path: &Path) -> io::Result<(File, u64)> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file; name a .gguf model",
        ));
    }
    if meta.len() == 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the file is empty; name a .gguf model",
        ));
    }
    Ok((file, meta.len()))
}

/// Files at these places of `len` bytes. An error comes with the number of the file that it is about.
#[cfg(unix)]
fn join(files: &[File], ranges: &[Range<usize>], len: usize) -> Result<Bytes, (usize, io::Error)> {
    let mut joined = Joined::reserve(len).map_err(|error| (0, error))?;
    for (i, (file, range)) in files.iter().zip(ranges).enumerate() {
        let placed = joined.place(range.start, range.len(), file);
        placed.map_err(|error| (i, error))?;
    }
    Ok(Bytes::Several(joined))
}

/// The same where files cannot be mapped at places of one's own: they are read.
#[cfg(not(unix))]
fn join(files: &[File], ranges: &[Range<usize>], len: usize) -> Result<Bytes, (usize, io::Error)> {
    use std::io::Read;
    let mut bytes = MmapMut::map_anon(len).map_err(|error| (0, error))?;
    for (i, (mut file, range)) in files.iter().zip(ranges).enumerate() {
        let read = file.read_exact(&mut bytes[range.clone()]);
        read.map_err(|error| (i, error))?;
    }
    Ok(Bytes::One(bytes))
}

/// Makes all pages of a piece of a map, which is about to be read and written, this process's own at once. Otherwise reading maps
/// each page of the file and writing replaces it by a copy: two page faults each, and all processors of the process have to forget
/// the first mapping. Where the system has no such thing (Linux before 5.14 and others) pages come one by one.
pub(crate) fn own_pages(bytes: &mut [u8]) {
    #[cfg(target_os = "linux")]
    if !bytes.is_empty() {
        let before = bytes.as_ptr().addr() % page_size();
        let start = bytes.as_mut_ptr().wrapping_sub(before);
        // SAFETY: the pages are those that hold the slice, all of which are mapped, and no byte of them is changed.
        unsafe {
            libc::madvise(
                start.cast(),
                before + bytes.len(),
                libc::MADV_POPULATE_WRITE,
            )
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = bytes;
}

/// The size of a page of memory in bytes.
fn page_size() -> usize {
    #[cfg(unix)]
    {
        // SAFETY: sysconf has no preconditions.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(size).unwrap_or(4096)
    }
    #[cfg(not(unix))]
    {
        4096
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn pages_become_our_own_with_what_the_file_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let written: Vec<u8> = (0..10 * page_size()).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &written).unwrap();
        let mut map = Map::open(&path).unwrap();
        own_pages(&mut map.bytes_mut()[page_size() + 100..4 * page_size() + 100]);
        assert!(map.bytes() == written);
        let ours = map.residency().unwrap().private;
        let probe = MmapMut::map_anon(page_size()).unwrap();
        let known = probe.advise(memmap2::Advice::PopulateWrite).is_ok();
        assert_eq!(ours, if known { 4 * page_size() as u64 } else { 0 });
        own_pages(&mut map.bytes_mut()[..0]);
        own_pages(&mut []);
    }
}
