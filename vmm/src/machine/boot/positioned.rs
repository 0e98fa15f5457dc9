//! A file read by `pread`, for loaders that want to seek: the descriptor's own position, which
//! guests starting meanwhile may share, is never used.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

pub(crate) struct Positioned<'a> {
    file: &'a File,
    head: &'a [u8],
    offset: u64,
}

impl<'a> Positioned<'a> {
    /// `head` is the file's beginning, already read.
    pub(crate) fn new(file: &'a File, head: &'a [u8]) -> Positioned<'a> {
        Positioned { file, head, offset: 0 }
    }

    /// What lies at the offset, where `len` bytes of it were read before.
    fn known(&self, len: usize) -> Option<&'a [u8]> {
        let start = usize::try_from(self.offset).ok()?;
        self.head.get(start..start.checked_add(len)?)
    }
}

/// Bytes of a file, by `fstat` (the sandbox has no `statx`, which the standard library would use).
pub(crate) fn len(file: &File) -> io::Result<u64> {
    let status = rustix::fs::fstat(file)?;
    u64::try_from(status.st_size).map_err(|_| io::ErrorKind::InvalidData.into())
}

impl Read for Positioned<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match self.known(buffer.len()) {
            Some(known) => {
                buffer.copy_from_slice(known);
                known.len()
            }
            None => self.file.read_at(buffer, self.offset)?,
        };
        self.offset += read as u64;
        Ok(read)
    }
}

impl Seek for Positioned<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let offset = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(by) => self.offset.checked_add_signed(by),
            SeekFrom::End(by) => len(self.file)?.checked_add_signed(by),
        };
        self.offset = offset.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.offset)
    }
}

impl ReadVolatile for Positioned<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let guard = buffer.ptr_guard_mut();
        // SAFETY: the guard is `buffer.len()` bytes of mapped guest memory; no vCPU runs yet and
        // no other reference to it exists while the image is loaded.
        let target = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), buffer.len()) };
        let read = self.read(target).map_err(VolatileMemoryError::IOError)?;
        vm_memory::bitmap::Bitmap::mark_dirty(buffer.bitmap(), 0, read);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory_file;
    use super::*;

    #[test]
    fn what_was_read_before_is_not_read_again_and_the_rest_is() {
        let file = memory_file(b"-----56789");
        let mut positioned = Positioned::new(&file, b"01234");
        let mut read = |to, len: usize| {
            let mut bytes = vec![0; len];
            positioned.seek(SeekFrom::Start(to)).unwrap();
            let read = positioned.read(&mut bytes).unwrap();
            String::from_utf8(bytes[..read].to_vec()).unwrap()
        };
        assert_eq!(read(0, 5), "01234");
        assert_eq!(read(3, 2), "34");
        assert_eq!(read(5, 3), "567");
        assert_eq!(read(8, 9), "89");
        // Across the end of what is known the file itself answers.
        assert_eq!(read(4, 3), "-56");
    }
}
