//! [`RemoteMemory`] of a live process, by `process_vm_readv(2)`. Reads only; needs no stop.

use super::maps;
use crate::addr::RemoteAddr;
use crate::memory::{ReadError, RemoteMemory};
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use std::io::IoSliceMut;

/// The kernel's `UIO_MAXIOV`: buffers in one `process_vm_readv`.
const MAX_IOVECS: usize = 1024;

/// The memory of a live process.
#[derive(Debug, Clone, Copy)]
pub struct ProcessMemory {
    pid: Pid,
}

impl ProcessMemory {
    /// Memory of process `pid`. Nothing is checked until the first read.
    pub fn new(pid: i32) -> Self {
        Self { pid: Pid::from_raw(pid) }
    }

    fn readv(&self, local: &mut [IoSliceMut<'_>], remote: &[RemoteIoVec]) -> Result<usize, Errno> {
        match process_vm_readv(self.pid, local, remote) {
            // The process is gone, or only its leader.
            Err(Errno::ESRCH) => match maps::memory_holder(self.pid.as_raw()) {
                tid if tid == self.pid.as_raw() => Err(Errno::ESRCH),
                tid => process_vm_readv(Pid::from_raw(tid), local, remote),
            },
            answer => answer,
        }
    }
}

impl RemoteMemory for ProcessMemory {
    fn read(&self, addr: RemoteAddr, buf: &mut [u8]) -> Result<(), ReadError> {
        let len = buf.len();
        let mut done = 0;
        while done < len {
            let at = addr.offset(done as u64);
            let remote = [RemoteIoVec { base: at.0 as usize, len: len - done }];
            match self.readv(&mut [IoSliceMut::new(&mut buf[done..])], &remote) {
                Ok(0) | Err(Errno::EFAULT) => return Err(ReadError::Unmapped { addr, len }),
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(Errno::ESRCH) => return Err(ReadError::Gone { addr, len }),
                Err(errno) => return Err(ReadError::Refused { addr, len, errno }),
            }
        }
        Ok(())
    }

    fn read_many(&self, wanted: &mut [(RemoteAddr, &mut [u8])]) -> Vec<bool> {
        let mut filled = vec![false; wanted.len()];
        let mut next = 0;
        while next < wanted.len() {
            let end = (next + MAX_IOVECS).min(wanted.len());
            let batch = &mut wanted[next..end];
            let remote: Vec<_> = batch
                .iter()
                .map(|(addr, buf)| RemoteIoVec { base: addr.0 as usize, len: buf.len() })
                .collect();
            let mut local: Vec<_> = batch.iter_mut().map(|(_, buf)| IoSliceMut::new(buf)).collect();
            // The kernel stops at the first element that it cannot read whole; what came before is good.
            let mut read = self.readv(&mut local, &remote).unwrap_or(0);
            while next < end && read >= remote[next + remote.len() - end].len {
                read -= remote[next + remote.len() - end].len;
                filled[next] = true;
                next += 1;
            }
            if next < end {
                filled[next] = self.read(wanted[next].0, wanted[next].1).is_ok();
                next += 1;
            }
        }
        filled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own_process() {
        let value = [0x1234_5678_9abc_def0_u64, 7];
        let memory = ProcessMemory::new(std::process::id() as i32);
        let addr = RemoteAddr(value.as_ptr() as u64);
        assert_eq!(memory.read_u64(addr), Ok(value[0]));
        assert_eq!(memory.read_u64(RemoteAddr(8)), Err(ReadError::Unmapped { addr: RemoteAddr(8), len: 8 }));
    }

    #[test]
    fn a_bad_address_among_good_ones_fails_alone() {
        let value = [5_u64, 6, 7];
        let base = RemoteAddr(value.as_ptr() as u64);
        let memory = ProcessMemory::new(std::process::id() as i32);
        let (mut a, mut b, mut c) = ([0; 8], [0; 8], [0; 8]);
        let filled = memory.read_many(&mut [
            (base, &mut a[..]),
            (RemoteAddr(16), &mut b[..]),
            (base.offset(16), &mut c[..]),
        ]);
        assert_eq!(filled, [true, false, true]);
        assert_eq!((a[0], c[0]), (5, 7));
    }
}
