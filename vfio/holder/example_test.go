package holder_test

import (
	"errors"
	"fmt"

	"viaduct/vfio/holder"
)

// What somebody uses is refused, unless the kind of who uses it is overridden.
func ExampleRefuse() {
	users := []holder.Holder{{Device: "0000:07:01.0", Kind: holder.Route, What: "carries the default route"}}
	err := holder.Refuse("take 0000:07:01.0", users, nil, "")
	fmt.Println(errors.Is(err, holder.ErrRefused))
	fmt.Println(err)
	fmt.Println(holder.Refuse("take 0000:07:01.0", users, []holder.Kind{holder.Route}, ""))
	// Output:
	// true
	// refused to take 0000:07:01.0: 0000:07:01.0 carries the default route [--force=route]
	// <nil>
}
