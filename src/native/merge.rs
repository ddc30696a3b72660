//! [`merge`]: Python's frames where the interpreter's loop ran them. Pure.
//!
//! CPython runs Python code in one C function, its loop (`_PyEval_EvalFrameDefault`). Up to 3.10 each Python frame is one call of it; from
//! 3.11 on Python code that calls Python code stays in the same call, and CPython marks the frame with which a call began. So the
//! n-th frame of the loop, from the innermost, has run the n-th run of Python frames that ends with such a mark.

/// A frame of a merged stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Merged<P> {
    /// The C frame with this number.
    Native(usize),
    /// A Python frame.
    Python(P),
}

/// Puts Python frames (innermost first, by call of the loop) in place of the loop's frames among the C frames (innermost first; true for
/// one of the loop).
///
/// Where the C frames are cut short, what is left of Python's follows; a frame of the loop for which Python has none (it has just
/// been called, or it belongs to another greenlet, whose C frames lie further up) stays what it is.
pub fn merge<P>(native: &[bool], python: Vec<Vec<P>>) -> Vec<Merged<P>> {
    let loops = native.iter().filter(|is_loop| **is_loop).count();
    // The thread stands in the first instructions of the loop: Python does not know of this call yet.
    let just_called = native.first() == Some(&true) && loops == python.len() + 1;
    let (mut calls, mut merged) = (python.into_iter(), Vec::new());
    for (number, is_loop) in native.iter().enumerate() {
        let run = if *is_loop && !(just_called && number == 0) { calls.next() } else { None };
        match run {
            Some(frames) => merged.extend(frames.into_iter().map(Merged::Python)),
            None => merged.push(Merged::Native(number)),
        }
    }
    merged.extend(calls.flatten().map(Merged::Python));
    merged
}

#[cfg(test)]
mod tests {
    use super::Merged::{Native, Python};
    use super::*;

    #[test]
    fn each_call_of_the_loop_becomes_what_it_ran() {
        let native = [false, true, false, true, false];
        let merged = merge(&native, vec![vec!["c", "b"], vec!["a"]]);
        assert_eq!(merged, [Native(0), Python("c"), Python("b"), Native(2), Python("a"), Native(4)]);
    }

    #[test]
    fn what_is_cut_short_goes_on_with_pythons_frames() {
        assert_eq!(merge(&[false, true], vec![vec![2], vec![1]]), [Native(0), Python(2), Python(1)]);
        assert_eq!(merge(&[false], vec![vec![1]]), [Native(0), Python(1)]);
    }

    #[test]
    fn a_call_that_python_does_not_know_of_stays() {
        assert_eq!(merge(&[true, false, true], vec![vec![1]]), [Native(0), Native(1), Python(1)]);
        assert_eq!(merge(&[false, true, true], vec![vec![1]]), [Native(0), Python(1), Native(2)]);
        assert_eq!(merge::<u8>(&[true, false], Vec::new()), [Native(0), Native(1)]);
    }
}
