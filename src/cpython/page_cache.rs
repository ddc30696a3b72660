//! Memory read page by page and kept: for one look at a target that stands still.
//!
//! Frames of 3.11+ lie next to each other, so one read of a page serves dozens. Valid for one stop only: drop or
//! [`PageCache::clear`] it before the target runs.

use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};
use std::cell::RefCell;

const PAGE: u64 = 4096;
/// Pages kept (256 KiB); then the cache starts anew.
const MAX_PAGES: usize = 64;

/// A cache in front of `inner`.
pub struct PageCache<'a> {
    inner: &'a dyn RemoteMemory,
    pages: RefCell<Pages>,
}

#[derive(Default)]
struct Pages {
    /// Most recently read last.
    loaded: Vec<(u64, Box<[u8; PAGE as usize]>)>,
    /// Buffers to use again.
    spare: Vec<Box<[u8; PAGE as usize]>>,
}

impl<'a> PageCache<'a> {
    /// An empty cache.
    pub fn new(inner: &'a dyn RemoteMemory) -> Self {
        Self { inner, pages: RefCell::default() }
    }

    /// Forgets every page, keeping the buffers.
    pub fn clear(&self) {
        let mut pages = self.pages.borrow_mut();
        let Pages { loaded, spare } = &mut *pages;
        spare.extend(loaded.drain(..).map(|(_, buffer)| buffer));
    }

    fn with_page<T>(&self, base: u64, then: impl FnOnce(&[u8; PAGE as usize]) -> T) -> Result<T, ReadError> {
        let mut pages = self.pages.borrow_mut();
        if let Some((_, page)) = pages.loaded.iter().rev().find(|(at, _)| *at == base) {
            return Ok(then(page));
        }
        let mut buffer = pages.spare.pop().unwrap_or_else(|| Box::new([0; PAGE as usize]));
        if let Err(error) = self.inner.read(RemoteAddr(base), &mut buffer[..]) {
            pages.spare.push(buffer);
            return Err(error);
        }
        if pages.loaded.len() >= MAX_PAGES {
            let Pages { loaded, spare } = &mut *pages;
            spare.extend(loaded.drain(..).map(|(_, buffer)| buffer));
        }
        let answer = then(&buffer);
        pages.loaded.push((base, buffer));
        Ok(answer)
    }
}

impl RemoteMemory for PageCache<'_> {
    fn read(&self, addr: RemoteAddr, buf: &mut [u8]) -> Result<(), ReadError> {
        // A big read would only push the small ones out.
        if buf.len() > 4 * PAGE as usize {
            return self.inner.read(addr, buf);
        }
        let mut done = 0;
        while done < buf.len() {
            let at = addr.offset(done as u64);
            let from = (at.0 % PAGE) as usize;
            let len = (PAGE as usize - from).min(buf.len() - done);
            let copied = self.with_page(at.0 - from as u64, |page| {
                buf[done..done + len].copy_from_slice(&page[from..from + len]);
            });
            match copied {
                Ok(()) => done += len,
                // The target of tests need not be whole pages; and the error must name what was asked for.
                Err(_) => return self.inner.read(addr, buf),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    struct Counting(Cell<u32>);

    impl RemoteMemory for Counting {
        fn read(&self, addr: RemoteAddr, buf: &mut [u8]) -> Result<(), ReadError> {
            self.0.set(self.0.get() + 1);
            if addr.0 >= 0x100_0000 {
                return Err(ReadError::Unmapped { addr, len: buf.len() });
            }
            for (i, b) in buf.iter_mut().enumerate() {
                *b = ((addr.0 + i as u64) % 251) as u8;
            }
            Ok(())
        }
    }

    #[test]
    fn reads_within_a_page_cost_one_read_until_cleared() {
        let memory = Counting(Cell::new(0));
        let cache = PageCache::new(&memory);
        for at in [0x1000_u64, 0x1800, 0x1ff0] {
            assert_eq!(cache.read_u8(RemoteAddr(at)), Ok((at % 251) as u8));
        }
        assert_eq!(memory.0.get(), 1);
        assert_eq!(cache.read_vec(RemoteAddr(0x1ffe), 4).unwrap()[3], (0x2001 % 251) as u8);
        assert_eq!(memory.0.get(), 2);
        cache.clear();
        cache.read_u8(RemoteAddr(0x1000)).unwrap();
        assert_eq!(memory.0.get(), 3);
    }

    #[test]
    fn it_stays_small_and_passes_failures_on() {
        let memory = Counting(Cell::new(0));
        let cache = PageCache::new(&memory);
        for page in 0..1000 {
            cache.read_u8(RemoteAddr(page * PAGE)).unwrap();
        }
        assert!(cache.pages.borrow().loaded.len() <= MAX_PAGES);
        let addr = RemoteAddr(0x100_0000);
        assert_eq!(cache.read_u64(addr), Err(ReadError::Unmapped { addr, len: 8 }));
    }
}
